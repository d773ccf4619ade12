"""Questions for 09_vram."""

from ._frame import Question, no, yes

QUESTIONS = (
    Question(
        "You replace full fine-tuning by LoRA, and the memory of a step with long texts hardly falls. Why?",
        (
            no(
                "LoRA was attached to too many layers.",
                "Fewer layers help a little. Most activations are kept whatever carries an adapter.",
            ),
            yes(
                "Most of it was activations and logits, and the gradient still passes through every layer.",
                "Optimizer states and gradients vanish, as promised. With long texts they were the smaller part.",
            ),
            no(
                "The frozen weights still get gradients.",
                "They get none: a frozen linear layer keeps nothing of its input either.",
            ),
        ),
    ),
    Question(
        "Gradient checkpointing is on. What is kept from the forward to the backward pass?",
        (
            yes(
                "The input of each block; the rest of a block is computed again when the backward pass comes to it.",
                "So at the peak there is one block's worth of activations, and one input for each of the others.",
            ),
            no(
                "Nothing: all is computed again from the tokens.",
                "Then for each block all blocks before it would have to be computed anew.",
            ),
            no(
                "Every second activation.",
                "It goes by blocks. Keeping the inputs of blocks is what the models of transformers do.",
            ),
        ),
    ),
    Question(
        "nvidia-smi shows 3 GiB more than torch.cuda.max_memory_allocated(). Where are they?",
        (
            no("They leak.", "A leak grows from step to step. This is there from the first step on, and stays."),
            yes(
                "In segments that torch has reserved and not filled, and in the CUDA context.",
                "Blocks are cut from segments, and what is freed is kept for the next block that fits. The card sees "
                "segments only.",
            ),
            no("In the page cache of the files.", "That is in the computer's memory, not on the card."),
        ),
    ),
    Question(
        "The same model and the same number of tokens, in texts twice as long and half as many. With flash attention …",
        (
            no("activations grow fourfold.", "A matrix of scores would. Flash attention does not keep one."),
            yes(
                "activations stay the same.",
                "All that is kept has a row for each token. Only kernels that keep T × T scores, or a mask, care.",
            ),
            no("activations double.", "They follow the number of tokens, which is the same."),
        ),
    ),
    Question(
        "A prediction says 23.4 GiB reserved, and the card has 23.65 GiB. Will it run?",
        (
            no("Yes: 23.4 is less than 23.65.", "The context of CUDA takes some hundred MiB, and a screen more."),
            no("No: it never can.", "At the limit torch gives unused segments back and tries again."),
            yes(
                "Perhaps: the context has to fit too, and torch would have to clear its cache to make room.",
                "Play the tape again under that limit: this is what `verdict` does, and it calls this tight.",
            ),
        ),
    ),
)
