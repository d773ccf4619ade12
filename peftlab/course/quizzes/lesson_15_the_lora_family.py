"""Questions for 15_the_lora_family."""

from ._frame import Question, no, yes

QUESTIONS = (
    Question(
        "What does rsLoRA change?",
        (
            no("How A is drawn.", "A and B begin as LoRA's do."),
            yes(
                "The scale: α/√r in place of α/r.",
                "So that a step of SGD is as large at every rank. With Adam, the first step is so under α/r already.",
            ),
            no("The rank of each layer.", "That is AdaLoRA. Here all layers keep the rank that was asked for."),
        ),
    ),
    Question(
        "PiSSA starts at the largest singular values of W. What does the model compute before the first step?",
        (
            yes(
                "The base's outputs, exactly.",
                "What A and B begin with is taken out of the frozen part, so that the sum is the same W.",
            ),
            no(
                "The base's outputs, with W's largest singular values twice.",
                "They would be, if the frozen part still had them.",
            ),
            no("Noise, until A and B are trained.", "Nothing was drawn at random: A and B come from W itself."),
        ),
    ),
    Question(
        "An adapter was trained from PiSSA's start. What must its file hold, so that it fits the original base?",
        (
            no(
                "A and B as they are after training.",
                "Their product holds W's principal part too, and the original base has that already.",
            ),
            yes(
                "B·A − B₀·A₀, which is a LoRA of rank 2r.",
                "The change alone. It works on the base as it was published, beside any other adapter.",
            ),
            no("The residual weights.", "That would be a file of the model's size for each adapter."),
        ),
    ),
    Question(
        "What does DoRA train that LoRA does not?",
        (
            no("A third matrix between B and A.", "That is LoRA-XS, or Λ in AdaLoRA."),
            yes(
                "One number for each output: the length of its row of W.",
                "LoRA turns the rows, and their lengths follow from it; DoRA sets them apart.",
            ),
            no("The bias.", "It stays frozen, as the rest of the layer."),
        ),
    ),
    Question(
        "What is AdaLoRA's budget?",
        (
            no(
                "The learning rate, which falls as training goes on.",
                "It has a schedule of its own, for something else.",
            ),
            no("The number of training steps.", "That is given, as for every method."),
            yes(
                "How many triplets all layers may keep together.",
                "Important ones stay, wherever they are: some layers end with many, others with none.",
            ),
        ),
    ),
    Question(
        "A paper finds that its variant beats LoRA, both at a learning rate of 2e-4. What is missing?",
        (
            yes(
                "Each method's own rate.",
                "A new scale or start moves the best rate. At one rate for all, that is most of what is compared.",
            ),
            no("More parameters for LoRA.", "Equal counts are fair. It is the rate that differs."),
            no("A larger model.", "It would be another experiment, with the same flaw."),
        ),
    ),
)
