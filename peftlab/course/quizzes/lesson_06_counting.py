"""Questions for 06_counting."""

from ._frame import Question, no, yes

QUESTIONS = (
    Question(
        "What do you need, to know exactly how many parameters LoRA trains in a 70B model?",
        (
            no(
                "The weights, in 4 bits at least.",
                "Their values do not matter for counting, only the shapes of the matrices.",
            ),
            yes(
                "Its config: the model can be built on the meta device, where tensors have a shape and no content.",
                "That takes no memory and a fraction of a second, and every count is exact.",
            ),
            no(
                "A formula of the paper; the exact number depends on the implementation.",
                "For one method, rank and list of layers there is one number. Formula and count must agree.",
            ),
        ),
    ),
    Question(
        "The same rank on all linear layers of a larger model of the same family: the trained share …",
        (
            no("grows.", "The number grows, but the model grows faster."),
            no(
                "stays the same.",
                "A matrix has in·out entries and its factors r·(in + out): the one grows with the square of the width.",
            ),
            yes(
                "falls, about as 2r / width.",
                "r·(d + d) / d² = 2r/d. A percentage without its model says little.",
            ),
        ),
    ),
    Question(
        "Summing over the state dict of Llama 3.2 1B gives 1.50 billion; it has 1.24 billion parameters. Why?",
        (
            yes(
                "Its output layer is its embedding: one tensor under two names.",
                "Tied weights count once. 128,256 token vectors of width 2048 are 263 million numbers, the difference.",
            ),
            no(
                "The state dict holds buffers too.",
                "Its rotary frequencies are a few dozen numbers, and are not stored at all.",
            ),
            no(
                "1.24 is rounded.",
                "So it is, to three digits; the difference is a fifth of the model.",
            ),
        ),
    ),
    Question(
        "A model loaded in 4 bits seems to have about half the parameters. Why?",
        (
            no(
                "Quantisation removes the small weights.",
                "That would be pruning. Here each weight is still there, with fewer digits.",
            ),
            yes(
                "Two 4-bit codes share a byte, and the bytes were counted.",
                "A percentage of them is twice too large. The count must ask the layer how many weights it stands for.",
            ),
            no(
                "The embeddings are left out.",
                "They usually stay in 16 bits and are counted as ever.",
            ),
        ),
        "bitsandbytes packs like this; pl.count and the reference library both correct for it",
    ),
    Question(
        "“Adapters reduce trainable parameters 10,000 times, from 70B to 10M.” What is the first thing to ask?",
        (
            no(
                "Whether the adapter was merged.",
                "Merging changes where the numbers are, not how many were trained.",
            ),
            no(
                "On which GPU it was trained.",
                "Counts do not depend on a machine.",
            ),
            yes(
                "Which model, rank and layers; and whether the division is right.",
                "70B / 10M is 7,000. The paper's 10,000 is about GPT-3 with r = 4 on two matrices a layer.",
            ),
        ),
        "Hu et al. 2021, arXiv:2106.09685, section 4.2",
    ),
)
