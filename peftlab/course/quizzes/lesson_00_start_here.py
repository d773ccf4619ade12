"""Questions for 00_start_here."""

from ._frame import Question, no, yes

QUESTIONS = (
    Question(
        "You attach a LoRA adapter and have not trained it yet. What does the model answer now?",
        (
            no(
                "Slightly noisier text, because the adapter starts with random numbers.",
                "A is random, but B is zero, and only the product B A is added to the layer's answer.",
            ),
            yes(
                "Exactly what it answered before.",
                "B starts at zero, so the added term is zero. You can check it: the logits are equal.",
            ),
            no(
                "Nothing useful until the first step was made.",
                "The base model is all there. An adapter adds to it; it does not stand in for it.",
            ),
        ),
        "Hu et al. 2021, arXiv:2106.09685, section 4.1",
    ),
    Question(
        "What is in the file that save_adapter writes?",
        (
            no(
                "The whole model with the changes worked in.",
                "That would be as large as the base. Compare the two sizes in the lesson: only the adapter is saved.",
            ),
            no(
                "The difference ΔW of every adapted weight.",
                "ΔW is as large as W itself. Its two thin factors A and B are stored instead.",
            ),
            yes(
                "The matrices A and B of each adapted layer; a small JSON file beside it says how they were made.",
                "That is why it is small, and why it says nothing without its base.",
            ),
        ),
    ),
    Question(
        "A colleague sends you an adapter of one megabyte. What do you need to use it?",
        (
            yes(
                "The very base model that it was trained on.",
                "The adapter is a correction to those weights. On other weights it corrects mistakes nobody made.",
            ),
            no(
                "Any model in which the layers have the same sizes.",
                "It would load, for the shapes fit, and answer badly: it was trained against other weights.",
            ),
            no(
                "Nothing else: the adapter is the fine-tuned model.",
                "It has a few per cent of the model's numbers. All the rest, the frozen part, is in the base.",
            ),
        ),
    ),
    Question(
        "After the training you switch the adapter off. What answers now?",
        (
            no(
                "The base, a little changed, for training has moved its weights too.",
                "The base is frozen: its weights got no gradient, and not a bit of them has changed.",
            ),
            no(
                "A mixture: what was learnt fades slowly.",
                "Nothing fades. The added term is either computed or left out.",
            ),
            yes(
                "The base, exactly as before the training.",
                "Off means exactly the base. On is another matter: with the adapter on, other skills can get lost.",
            ),
        ),
    ),
    Question(
        "Why are the SQL answers graded by running them on a database, and not by comparing them with the gold query?",
        (
            no(
                "Because running them is faster.",
                "Comparing two strings is much faster. It is the wrong measure, though.",
            ),
            yes(
                "Because two different queries can be equally right.",
                "Order of conditions, spaces, an alias: what counts is the rows that come back. The text is "
                "compared too, as the stricter of two measures.",
            ),
            no(
                "Because a query that runs is a right query.",
                "It may run and return the wrong rows. Its rows are compared with those of the gold query.",
            ),
        ),
    ),
)
