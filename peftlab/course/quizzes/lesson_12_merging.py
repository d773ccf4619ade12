"""Questions for 12_merging."""

from ._frame import Question, no, yes

QUESTIONS = (
    Question(
        "“LoRA adds no inference latency.” When is that so?",
        (
            no(
                "Always: the matrices are so small.",
                "Small in multiplications, but two more calls per layer, which take longer than their arithmetic.",
            ),
            yes(
                "After merging: then the model has the base's layers and nothing else.",
                "Unmerged, each layer does a product, a second one and an addition more.",
            ),
            no(
                "On a GPU.",
                "There the calls cost even more beside the arithmetic, unless many rows share them.",
            ),
        ),
    ),
    Question(
        "Which method cannot be merged into a linear layer's weight?",
        (
            yes(
                "Houlsby's adapter.",
                "It bends what comes out of the layer. No matrix does that, so `merge` refuses, and says why.",
            ),
            no(
                "(IA)³.",
                "It multiplies each output by a number: scale the weight's rows by it.",
            ),
            no(
                "LoRA with a higher rank than the layer needs.",
                "Whatever the rank, B·A is a matrix of the weight's shape.",
            ),
        ),
    ),
    Question(
        "What does `linear` do with two LoRAs of rank 8?",
        (
            no(
                "It gives the weighted sum of their two changes.",
                "That is `cat`, with rank 16. `linear` keeps rank 8.",
            ),
            yes(
                "It adds the A's and the B's, so that B₁·A₂ and B₂·A₁ come in as well.",
                "Two terms that nobody trained, and the more adapters, the more of them.",
            ),
            no(
                "It averages the two models' outputs.",
                "That would be an ensemble, at the cost of two models.",
            ),
        ),
    ),
    Question(
        "What are “trim” and “elect” in TIES for?",
        (
            no(
                "They make the adapter smaller, so that it is faster.",
                "The merged change has the shape it always has; zeros are computed like other numbers.",
            ),
            no(
                "They undo overfitting.",
                "Nothing is trained, and no data is looked at.",
            ),
            yes(
                "Entries that matter to one task must not be averaged away by noise and by signs that disagree.",
                "Trim drops the small ones, elect lets the heavier side decide, and the mean leaves the losers out.",
            ),
        ),
        "Yadav et al. 2023, arXiv:2306.01708, sections 3 and 4",
    ),
    Question(
        "Two users send requests in turns. Each has an adapter, and the two contradict each other. What serves both?",
        (
            no(
                "The best merge that can be found.",
                "The weights cannot know who asks.",
            ),
            no(
                "One adapter trained on both users' rows.",
                "It learns that the same question has two answers, and picks one.",
            ),
            yes(
                "Two adapters, switched for each request.",
                "Or for each row of a batch: the next lesson.",
            ),
        ),
    ),
)
