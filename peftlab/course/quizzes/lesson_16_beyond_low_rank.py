"""Questions for 16_beyond_low_rank."""

from ._frame import Question, no, yes

QUESTIONS = (
    Question(
        "A method trains 3,072 numbers of a layer, and its change has full rank. What follows?",
        (
            no(
                "It can make any change that full fine-tuning can make.",
                "The layer has 36,864 entries. With 3,072 numbers most of the changes are out of reach, of any rank.",
            ),
            no(
                "It learns more than a LoRA with 3,072 numbers.",
                "Both have as many degrees of freedom. What they learn is a question for an experiment.",
            ),
            yes(
                "Every direction of the input can be changed, but only in combinations that the structure allows.",
                "That is all that the rank says. What it can reach is decided by how the numbers are tied.",
            ),
        ),
    ),
    Question(
        "Why is (W₁ ⊗ W₂)x cheap?",
        (
            yes(
                "With x as a matrix X it is W₁XW₂ᵀ: two small products, and the large matrix is never built.",
                "The same trick makes Compacter's layers cheap, which lesson 03 has.",
            ),
            no(
                "Because the product is sparse.",
                "It is dense: each entry of W₁ times each entry of W₂.",
            ),
            no(
                "Because it has low rank.",
                "Its rank is the product of the two ranks, which can be full.",
            ),
        ),
        "Van Loan and Pitsianis 1993; Yeh et al. 2023, arXiv:2309.14859, section 3",
    ),
    Question(
        "What stays the same when OFT, and nothing else, changes a weight?",
        (
            no(
                "The answers of the layer.",
                "Then there would be nothing to train.",
            ),
            yes(
                "The lengths of its rows and the angles between them, and so its singular values.",
                "All rows are turned by one and the same rotation.",
            ),
            no(
                "The entries outside of the blocks.",
                "The rotation is block-diagonal, the change W₀(Rᵀ − I) is not: all columns move.",
            ),
        ),
        "Qiu et al. 2023, arXiv:2306.07280",
    ),
    Question(
        "What do the factors of a butterfly buy?",
        (
            no(
                "A faster rotation of the same inputs in pairs.",
                "One factor mixes few neighbours and no others. It is their product that mixes many.",
            ),
            no(
                "Any rotation, from few numbers.",
                "The products fill the matrix, but they are few among all rotations: count the numbers.",
            ),
            yes(
                "Each factor doubles how many inputs are mixed, so that m factors reach as far as one large block.",
                "With m·in·(b−1)/2 free numbers instead of those of a block 2ᵐ⁻¹ times as large.",
            ),
        ),
        "Liu et al. 2023, arXiv:2311.06243, section 4",
    ),
    Question(
        "Rank 8 holds far more of a real change than random places, random waves or circulant blocks with as many "
        "numbers. Why?",
        (
            yes(
                "LoRA may choose its directions after it has seen the change; the others have chosen before.",
                "Of a change that has nothing to do with it, a fixed structure holds about its share of the numbers.",
            ),
            no(
                "Because the real change has rank 8.",
                "It has not: half of it is in other directions. But some directions are stronger than others.",
            ),
            no(
                "Because LoRA has more degrees of freedom.",
                "It has as many numbers as the others, and a few of them are redundant.",
            ),
        ),
    ),
    Question(
        "So LoRA is the better method than those?",
        (
            no(
                "Yes: it comes nearest to full fine-tuning.",
                "Nearest to the change that full fine-tuning made. There are many other changes that solve the task.",
            ),
            no(
                "No: a higher rank is always better.",
                "More directions often went along with a lower loss here, and often is not always.",
            ),
            yes(
                "That was not asked. Train each, at its own tuned rate, and look at the task.",
                "A structure need not hit the change that another method made in order to lower the loss.",
            ),
        ),
    ),
)
