"""Questions for 17_mixtures_and_routing."""

from ._frame import Question, no, yes

QUESTIONS = (
    Question(
        "Where does Arrow take its router from?",
        (
            no(
                "It is trained on a few examples of each task.",
                "Nothing is trained, and no example is looked at.",
            ),
            yes(
                "From the adapters' own weights: the input direction that each B·A stretches most.",
                "Whoever has the files can compute it. The data they were trained on may be gone.",
            ),
            no(
                "From the names of the adapters.",
                "A service that knows names needs no router: it switches.",
            ),
        ),
        "Ostapenko et al. 2024, arXiv:2405.11157",
    ),
    Question(
        "For the pirate's questions Arrow chose the right adapter most often, and yet its answers were bad. Why?",
        (
            no(
                "The prototypes have no sign.",
                "Hence the absolute value, which loses nothing.",
            ),
            no(
                "The adapters are too small for a router.",
                "The same adapters answer well when one of them speaks alone.",
            ),
            yes(
                "Each layer chose for each token anew, so every text met a mixture of all of them.",
                "The right adapter had the most votes, but the others had the rest, spoke, too, and moved the inputs "
                "of the next layers.",
            ),
        ),
    ),
    Question(
        "What does X-LoRA's classifier read?",
        (
            yes(
                "The last hidden state of the base, from a first pass over the whole text.",
                "So it knows much about each token; each answer takes two passes, here without a cache.",
            ),
            no(
                "The number of the task.",
                "That is Poly. X-LoRA works where nobody says which task it is.",
            ),
            no(
                "The layer's own input.",
                "That is Arrow, MixLoRA and Lily: cheaper, and each layer for itself.",
            ),
        ),
        "Buehler and Buehler 2024, arXiv:2402.07148",
    ),
    Question(
        "A mixture chooses per token. Can it be merged into the base's weights?",
        (
            no(
                "Yes, all LoRAs can.",
                "Each of them can. Their sum with weights that depend on the input is no matrix.",
            ),
            no(
                "Yes, if all experts have the same rank.",
                "The rank is not the obstacle.",
            ),
            yes(
                "No. A fixed mixture can: LoraHub's, LoRA soup's, and one task's of Poly.",
                "Whatever is decided before the input is known, is a constant and can be folded in.",
            ),
        ),
    ),
    Question(
        "What is the load-balance loss for?",
        (
            yes(
                "An expert that is chosen learns and is chosen again: without it, some may never be used.",
                "It pays for spreading the tokens. It does not ask whether that makes sense.",
            ),
            no(
                "It makes the router choose the right expert.",
                "It knows of no right ones: that is the task's loss.",
            ),
            no(
                "It saves memory.",
                "All experts are kept, busy or not. Where they are on several GPUs, an even load saves time.",
            ),
        ),
        "Fedus et al. 2021, arXiv:2101.03961, section 2.2",
    ),
    Question(
        "In a chart of a hundred methods, one is two points above LoRA. Three seeds each, one task. What follows?",
        (
            no(
                "It is better than LoRA.",
                "The best of a hundred is partly the luckiest of a hundred.",
            ),
            no(
                "Nothing at all: such charts are useless.",
                "Large gaps mean something, and so does what a method costs.",
            ),
            yes(
                "It is worth a try on your task, beside LoRA, each at its own rate.",
                "Look at the seeds' range first, and remember that the base is small and the budget short.",
            ),
        ),
    ),
)
