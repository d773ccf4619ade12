"""Questions for 08_qlora."""

from ._frame import Question, no, yes

QUESTIONS = (
    Question(
        "In QLoRA, what is computed in four bits?",
        (
            no(
                "The matrix products: that is why less memory is needed.",
                "They are computed in bfloat16 or float32: NF4 codes, with their uneven levels, cannot be multiplied.",
            ),
            yes(
                "Nothing: four bits is how the frozen weights are stored. They are unpacked whenever they are used.",
                "Storage type and compute type are two things. So QLoRA saves memory, and costs time.",
            ),
            no(
                "The adapter: A and B are small enough to stand the rounding.",
                "A and B are trained, and small steps would be rounded away. They are in bfloat16 or float32.",
            ),
        ),
        "Dettmers et al. 2023, arXiv:2305.14314, section 3, equations 5 and 6",
    ),
    Question(
        "The frozen weights get no gradient. Why does the backward pass need them all the same?",
        (
            yes(
                "The layers below have adapters too, and their gradient comes through the frozen layer: gx = gy·W.",
                "That is why it is unpacked a second time in each step, or would have to be kept dense until then.",
            ),
            no(
                "For the gradient of A and B.",
                "These need x, gy, A and B. W does not appear in them.",
            ),
            no(
                "It does not: what is frozen takes no part in the backward pass.",
                "Then only the last layer's adapters would be trained. Frozen means not changed; it still passes on.",
            ),
        ),
    ),
    Question(
        "What does a layer of this package's NF4 base keep for the backward pass?",
        (
            no(
                "The dense weights, so that they are unpacked once a step.",
                "Of all layers together that would be the whole dense model: the saving would be gone when it counts.",
            ),
            no(
                "Its input x, as every linear layer.",
                "x is needed for the gradient of W, and W has none. The adapter beside it keeps its own.",
            ),
            yes(
                "Nothing but the packed weights, which it stores anyway.",
                "They are saved by reference: no new byte. The price is a second unpacking.",
            ),
        ),
    ),
    Question(
        "A LoRA trained on an NF4 base is merged into the dequantised weights, and the sum packed again. What is it?",
        (
            no(
                "The trained model, in 4 bits: NF4 holds any weights as well as the first ones.",
                "It rounds them as coarsely as the first ones: with errors of about the size of ΔW.",
            ),
            yes(
                "A new model: every weight of the sum is rounded to one of 16 levels, by as much as ΔW itself may be.",
                "Keep base and adapter apart, or merge into dense weights, or test what is left after packing.",
            ),
            no(
                "The base again: ΔW is always smaller than a step between two levels.",
                "Many weights do change their code, so it is not the base; and not the trained model either.",
            ),
        ),
    ),
    Question(
        "What is a paged optimizer for?",
        (
            no(
                "It makes each step faster.",
                "A page that has to come back from the processor's memory takes time.",
            ),
            no(
                "It stores the optimizer states in 8 bits.",
                "That is the 8-bit optimizer, another thing; both can be combined.",
            ),
            yes(
                "It is for peaks: where a long text needs more memory than there is, the states move out of its way.",
                "Adapter states are small, so the paging helps little on average. It turns a crash into a slow step.",
            ),
        ),
        "Dettmers et al. 2023, arXiv:2305.14314, section 3, “Paged Optimizers”",
    ),
    Question(
        "“QLoRA matches 16-bit fine-tuning.” What does that rest on in the paper?",
        (
            yes(
                "On benchmarks in which the two came out alike.",
                "It is said of these models and tasks, with adapters on all linear layers. A small gap may be hidden.",
            ),
            no(
                "On a proof that NF4 loses no information.",
                "Sixteen levels cannot hold 16-bit weights. The claim is that training makes up for what is lost.",
            ),
            no(
                "On the adapter having as many parameters as the base.",
                "It has a percent or so of them.",
            ),
        ),
        "Dettmers et al. 2023, arXiv:2305.14314, section 4",
    ),
)
