"""Questions for 07_four_bits."""

from ._frame import Question, no, yes

QUESTIONS = (
    Question(
        "A matrix is stored in NF4, in blocks of 64 with float32 scales. Why does a weight take 4.5 bits and not 4?",
        (
            no(
                "Every eighth weight is kept in 8 bits.",
                "All weights get 4 bits. What else has to be stored to come back from codes to weights?",
            ),
            no(
                "NF4 has about 23 levels, which takes 4.5 bits.",
                "It has 16 levels, 4 bits. Something else is stored beside the codes.",
            ),
            yes(
                "64 weights share a scale of 32 bits: half a bit each.",
                "4 + 32/64 = 4.5. Larger blocks cost less and fit worse: that is the trade.",
            ),
        ),
    ),
    Question(
        "What does double quantisation quantise a second time?",
        (
            yes(
                "The scales: each becomes a code of 8 bits.",
                "4 + 8/64 + 32/(64 · 256) = 4.127 bits. The weights' own codes stay what they are.",
            ),
            no(
                "The codes, from 4 bits to 2.",
                "Then it would save far more than 0.373 bits a weight, and lose far more.",
            ),
            no(
                "The weights that have the largest error.",
                "That is an idea of other methods. Here it is the numbers that stand beside the codes.",
            ),
        ),
        "Dettmers et al. 2023, arXiv:2305.14314, section 3",
    ),
    Question(
        "One weight of a large matrix is 50 times larger than any other. In blocks of 64, who pays for it?",
        (
            no(
                "All weights: the matrix has a wide range now.",
                "With one scale for the matrix they would. Here each block has a scale of its own.",
            ),
            yes(
                "The 63 weights in its block.",
                "They become zero, or nearly so; all others come back as before. That is what blocks are for.",
            ),
            no(
                "The large weight itself: it is cut off.",
                "It sets its block's absmax, so it comes back (nearly) exactly: its code is the outermost level.",
            ),
        ),
    ),
    Question(
        "Why are the levels of NF4 not evenly spaced?",
        (
            no(
                "Even levels cannot have a zero among them.",
                "INT4 has one: -7 … 7, divided by 7.",
            ),
            no(
                "The hardware computes faster with them.",
                "No processor computes in NF4: codes are looked up in a table and become ordinary numbers first.",
            ),
            yes(
                "Trained weights look normal: levels lie denser where weights are.",
                "They are quantiles of the normal distribution. On even steps the outer codes are hardly used.",
            ),
        ),
    ),
    Question(
        "A model of 7 billion parameters in NF4 with double quantisation: why is it larger than 7e9 · 4.127 / 8 bytes?",
        (
            yes(
                "Embeddings, norms and the output head stay in 16 bits.",
                "Only linear layers inside the transformer blocks are packed. In a small model the rest is large.",
            ),
            no(
                "The codes are unpacked into 16 bits when it is loaded.",
                "A layer is unpacked for a moment while it computes; what stays in memory is packed.",
            ),
            no(
                "Frozen weights need gradients too.",
                "They need none: four bits cannot be trained, and nothing asks them to.",
            ),
        ),
    ),
    Question(
        "Four bits left a model's score on a test where it was, within the interval. What may you say?",
        (
            no(
                "Four bits lose nothing.",
                "The weights have changed by several percent. This test did not show it; a loss on text may.",
            ),
            yes(
                "On this test, a loss larger than the interval is unlikely.",
                "That is what an interval says. What the model can only just do may suffer first, so test that too.",
            ),
            no(
                "Nothing: quantisation must be judged by the error of the weights.",
                "That error matters only through what the model does. But it is cheap and can be compared exactly.",
            ),
        ),
    ),
)
