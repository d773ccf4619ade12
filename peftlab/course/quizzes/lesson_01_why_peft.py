"""Questions for 01_why_peft."""

from ._frame import Question, no, yes

QUESTIONS = (
    Question(
        "Full fine-tuning with Adam in mixed precision takes 16 bytes per parameter. What are most of them?",
        (
            no(
                "The weights in 16 bits.",
                "These are 2 of the 16 bytes, and LoRA must keep them as well: the forward pass needs them.",
            ),
            no(
                "The gradients.",
                "These are another 2 of the 16 bytes.",
            ),
            yes(
                "What the optimizer keeps: a float32 copy of the weights, momentum and variance.",
                "3 × 4 = 12 of the 16 bytes. They exist for trained parameters only, so freezing saves them.",
            ),
        ),
        "Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1",
    ),
    Question(
        "You train 0.1 % of the parameters. How much faster is a training step?",
        (
            no(
                "About 1000 times.",
                "Every frozen layer still runs forward, and the gradient still runs backward through it.",
            ),
            yes(
                "A little: it cannot fall far below two thirds of a full step.",
                "Forward, gradient of the inputs, gradient of the weights: three products of about the same cost. "
                "Only the third is saved.",
            ),
            no(
                "Not at all, for the gradients of all weights must be computed before most are thrown away.",
                "A frozen weight gets no gradient in the first place: that third of the work is left out.",
            ),
        ),
    ),
    Question(
        "Does LoRA save the memory of the activations?",
        (
            no(
                "Yes: frozen layers need no activations.",
                "The gradient on its way to lower adapters passes through attention, norms and non-linearities, "
                "which need theirs. Also, each adapter keeps its own input.",
            ),
            yes(
                "Hardly. With a large batch or long texts it may need as much memory as full fine-tuning.",
                "A frozen linear layer need not keep its input, but nearly everything else stays. Gradient "
                "checkpointing is the cure, and it works with adapters.",
            ),
            no(
                "Yes: activations shrink with the number of trained parameters.",
                "Their size depends on batch, tokens, width and depth. None of these has changed.",
            ),
        ),
        "A frequent report, for instance github.com/huggingface/peft/issues/1514",
    ),
    Question(
        "A 70B model in 16 bits takes 140 GB. Ten tasks: ten copies, or one base and ten adapters of 100 MB?",
        (
            no(
                "The adapters save 99.9 %, for 1 GB stands against 1400 GB.",
                "The base has to be stored too, once: 141 GB against 1400 GB.",
            ),
            yes(
                "The adapters save about 90 %: 141 GB against 1400 GB.",
                "With more tasks it is more: the saving approaches 1 − 0.1/140, but ten tasks do not get beyond 90 %.",
            ),
            no(
                "The adapters save 10 %, since the base makes up most of it.",
                "This takes what remains for what is saved.",
            ),
        ),
    ),
    Question(
        "“Adapters prevent forgetting, because the base is frozen.” Is that so?",
        (
            no(
                "Yes: weights that do not change cannot forget.",
                "The weights do not change, the answers do. With the adapter on, other skills can get lost: ask the "
                "model what it knew before.",
            ),
            no(
                "No: after training, the base is damaged for good.",
                "Not a bit of it has changed. Switch the adapter off and you have it back.",
            ),
            yes(
                "Only with the adapter off. With it on, the model can forget, often less than after full fine-tuning.",
                "How much depends on learning rate, rank and data. Compare methods at the same quality on the task.",
            ),
        ),
        "Biderman et al. 2024, arXiv:2405.09673: LoRA learns less and forgets less",
    ),
    Question(
        "Where is an adapter of small rank a poor choice?",
        (
            yes(
                "Where the model must take in a lot that is new, say billions of tokens of another field.",
                "There full fine-tuning has been measured ahead: the update that is needed has a high rank.",
            ),
            no(
                "Where one model serves many tasks or users.",
                "That is where adapters shine: one base in memory, a small adapter for each.",
            ),
            no(
                "Where there are only a few hundred examples.",
                "Few trained parameters do no harm there; a full fine-tuning over-fits at least as easily.",
            ),
        ),
        "Biderman et al. 2024, arXiv:2405.09673",
    ),
)
