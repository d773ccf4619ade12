"""Questions for 10_forgetting."""

from ._frame import Question, no, yes

QUESTIONS = (
    Question(
        "A blog shows that LoRA forgets less than full fine-tuning: both had an epoch with the rate 0.0001. What is "
        "missing?",
        (
            no(
                "More epochs: forgetting takes time.",
                "More steps move both points along their curves. The two would still be compared at different places.",
            ),
            yes(
                "How much each of them learned. LoRA needs a higher rate, so here it may simply have learned less.",
                "Both axes are needed, and for each method a range of rates: then curves are compared, not two points.",
            ),
            no(
                "Nothing: the same rate is the fair comparison.",
                "The same rate means another step length for another set of parameters. Fair is: each at its own.",
            ),
        ),
        "Biderman et al. 2024, arXiv:2405.09673, sweep the rates of both for this reason",
    ),
    Question(
        "What is guaranteed about a frozen base with a trained LoRA on it?",
        (
            no(
                "That the model still knows what the base knew, as no weight of the base was changed.",
                "The adapter changes what every layer computes: the same weights, and other answers.",
            ),
            no(
                "That it forgets less than after full fine-tuning.",
                "In this lesson's experiment it is the other way round, and in others it depends on rate and rank.",
            ),
            yes(
                "That the base comes back, bit for bit, when the adapter is switched off.",
                "A matter of routing, not of learning: decide request by request whether the adapter is needed.",
            ),
        ),
    ),
    Question(
        "After training, a LoRA's ΔW is multiplied by ½. What is the same called for a fully fine-tuned model?",
        (
            yes(
                "WiSE-FT: interpolating between the weights before and after.",
                "W₀ + a·(W − W₀) = W₀ + a·ΔW. A smaller α at inference does the same for LoRA.",
            ),
            no(
                "Weight decay with λ = 0.5.",
                "Decay acts in each step and changes where training goes; and it pulls to zero, unless told otherwise.",
            ),
            no(
                "Dropout on the adapter.",
                "Dropout removes other entries in each step of training, and nothing afterwards.",
            ),
        ),
        "Wortsman et al. 2021, arXiv:2109.01903",
    ),
    Question(
        "Prompt tuning does not start as the base: a random soft prompt changes the answers before any training. "
        "What is its forgetting measured against?",
        (
            no(
                "Against itself before training, as for all methods.",
                "Then the harm of the random prompt would not count, and recovering from it would be a gain.",
            ),
            no(
                "Not at all: a prompt changes no weight, so nothing can be forgotten.",
                "Measured with the prompt on, its facts and list skills fall as those of other methods do.",
            ),
            yes(
                "Against the bare base: that is what its user had before.",
                "For methods that start as the base both are the same; for this one only the base is a fair zero.",
            ),
        ),
    ),
)
