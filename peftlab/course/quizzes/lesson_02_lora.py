"""Questions for 02_lora."""

from ._frame import Question, no, yes

QUESTIONS = (
    Question(
        "A layer of 4096 × 4096 gets LoRA with r = 8. What can be said of ΔW = (α/r) B A?",
        (
            no(
                "It has 65,536 entries, the number of trained parameters.",
                "A and B have that many together. Their product is a full 4096 × 4096 matrix.",
            ),
            yes(
                "It is a full-size matrix whose rank is at most 8.",
                "It can change any entry of W, but only along eight directions at a time.",
            ),
            no(
                "It has rank 4096, like W.",
                "The rank of a product is at most the rank of each factor, and A has eight rows.",
            ),
        ),
    ),
    Question(
        "Why does A start at random and B at zero, rather than both at zero?",
        (
            no(
                "Both at zero would start at the base as well and train as well.",
                "It would start at the base and stay there: each one's gradient has the other as a factor.",
            ),
            no(
                "So that A need not be trained.",
                "A is trained, from the second step on, when B is no longer zero. (Keeping A fixed is possible, and "
                "a method of its own: Zhang et al. 2023, LoRA-FA, arXiv:2308.03303.)",
            ),
            yes(
                "So that training starts at the base's answers, and B has a gradient from the first step.",
                "ΔW is zero, and ∂L/∂B has x Aᵀ as its factor, which is not.",
            ),
        ),
        "Hu et al. 2021, arXiv:2106.09685, section 4.1",
    ),
    Question(
        "You double alpha and leave everything else as it is. What changes?",
        (
            yes(
                "The update counts double, much as if the learning rate were higher.",
                "α/r is a factor before B A and before its gradients. Tune the learning rate again when you change it.",
            ),
            no(
                "The adapter gets twice as many parameters.",
                "That is r. Alpha is a plain number and is not trained.",
            ),
            no(
                "Nothing: training makes B half as large.",
                "It could in the long run, but with the same steps, B does not get there at the same pace.",
            ),
        ),
    ),
    Question(
        "“LoRA adds no latency at inference.” When is that true?",
        (
            no(
                "Always, for A and B are tiny.",
                "Each adapted layer makes two more products, one after the other. They are small, but each has to be "
                "started, and that is what takes the time for a short input. Measure it, merged and not.",
            ),
            no(
                "Never: the adapter must always be computed.",
                "W + (α/r) B A is one matrix of the old size, and can be computed once beforehand.",
            ),
            yes(
                "After merging it into the weights.",
                "Then the model has its old shape. The price: the adapters of other users cannot share the batch.",
            ),
        ),
        "Hu et al. 2021, arXiv:2106.09685, section 4.1",
    ),
    Question(
        "“LoRA trains 10,000 times fewer parameters.” What is to be said about that?",
        (
            no(
                "It holds for every model.",
                "A 4096 × 4096 layer with r = 8 has 256 times fewer, and the smaller the layer, the less it saves.",
            ),
            yes(
                "It is GPT-3 with r = 4 on q and v; it depends on model, rank and targets.",
                "18.9 of 175,000 million is nearly 10,000 times. On this course's base, r = 8 on all linear layers "
                "is about 20 times.",
            ),
            no(
                "It means 10,000 times less memory.",
                "The paper reports a third of the memory in the same sentence: the frozen weights are still there.",
            ),
        ),
        "Hu et al. 2021, arXiv:2106.09685, abstract",
    ),
    Question(
        "Rank 64 turns out worse than rank 8 at the same learning rate. What follows?",
        (
            no(
                "High ranks over-fit: 8 is the better rank.",
                "Possibly, but this experiment cannot tell: the best learning rate may differ from rank to rank.",
            ),
            yes(
                "Little, before the learning rate was tuned for each rank and a few seeds were run.",
                "With α fixed, the factor α/r changes with r as well, so both rank and step size were changed at once.",
            ),
            no(
                "There must be a mistake, since rank 64 contains rank 8.",
                "It contains every update of rank 8, but the training need not find one.",
            ),
        ),
        "Kalajdzievski 2023, arXiv:2312.03732, on scaling by α/√r",
    ),
)
