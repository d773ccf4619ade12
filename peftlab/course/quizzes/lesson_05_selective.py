"""Questions for 05_selective."""

from ._frame import Question, no, yes

QUESTIONS = (
    Question(
        "You call pl.attach(model, pl.BitFit) on a Llama. What happens, and why?",
        (
            yes(
                "An error: the model has no bias that could be trained.",
                "New biases can be added, by naming linear layers; that is a change of the architecture, though.",
            ),
            no(
                "Every linear layer's bias is trained.",
                "Llama's linear layers have none, and an RMSNorm has a weight only.",
            ),
            no(
                "It trains nothing, without a word.",
                "That would be the worst: a training run that cannot learn. It is refused before it starts.",
            ),
        ),
        "Ben Zaken et al. 2022, arXiv:2106.10199, on BERT and RoBERTa, which have biases everywhere",
    ),
    Question(
        "(IA)³ on a value projection: h = l ⊙ (W₀x). What is the rank of the change ΔW = (diag(l) − 1) W₀?",
        (
            no(
                "1, since l is one vector.",
                "l multiplies each row by its own factor. That is a diagonal matrix, not a product of two vectors.",
            ),
            yes(
                "As high as that of W₀, if no entry of l is exactly 1.",
                "Few numbers and low rank are two different restrictions: here the rank is full, and yet each row "
                "can only become longer or shorter.",
            ),
            no(
                "The number of trained parameters, whatever that is.",
                "LoRA with r = 8 trains thousands of numbers and has rank 8. The two are not linked like that.",
            ),
        ),
    ),
    Question(
        "(IA)³ with the learning rate that worked for full fine-tuning hardly learns. What do you try first?",
        (
            yes(
                "A rate that is ten to several hundred times higher.",
                "Adam moves each number by about the rate, however large the model. A few numbers must each move far.",
            ),
            no(
                "More trained parameters: the method is too weak.",
                "Perhaps it is. But with such a rate no gain has moved by more than a few percent so far.",
            ),
            no(
                "A lower rate: with few parameters each is delicate.",
                "It is the other way round: the fewer there are, the further each has to go.",
            ),
        ),
        "Liu et al. 2022, arXiv:2205.05638, section 3: (IA)³ is trained with a rate of 3e-3 (with Adafactor)",
    ),
    Question(
        "A model ties its output head to its input embedding. One new token is trained. What is true?",
        (
            no(
                "The head gets a copy, so that the two can differ.",
                "That unties them: twice the memory, and tools that rely on the tie write only one of the two.",
            ),
            no(
                "Only the input side can be trained; the head stays frozen.",
                "Then the model could read the new word, but would never be taught to say it.",
            ),
            yes(
                "One trained row acts at both ends, and the table itself stays as it was.",
                "Reading the word and saying it use the same vector, and both send their gradient to it.",
            ),
        ),
    ),
    Question(
        "Which of these can be merged into the frozen weights without any trace in the architecture?",
        (
            no(
                "All of them, always: they are only numbers.",
                "BitFit in a Llama adds a bias where the architecture has none, and new words make the table longer.",
            ),
            yes(
                "LN tuning and (IA)³; BitFit where there is a bias already.",
                "They end up in numbers that the model has anyway: gains, rows and columns of weights, biases.",
            ),
            no(
                "None: merging is a property of LoRA.",
                "Merging needs only that the adapted layer is still an affine map, or a norm with other weights.",
            ),
        ),
    ),
    Question(
        "“BitFit trains less than 0.1 % of the parameters.” When is that true?",
        (
            no(
                "Always: biases are few by definition.",
                "In a narrow model they are not. Their share goes like one over the width.",
            ),
            no(
                "Never: the classifier's head is trained too.",
                "It is trained too, in the paper as well, and has a few thousand numbers: not enough to change this.",
            ),
            yes(
                "For models as wide as BERT-base and up, that have biases.",
                "BERT-base 0.09 %, BERT-large 0.08 %. A model of width 192 is far above; a Llama has none to train.",
            ),
        ),
        "Ben Zaken et al. 2022, arXiv:2106.10199, section 3",
    ),
)
