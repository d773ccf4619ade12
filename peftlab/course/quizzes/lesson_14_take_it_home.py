"""Questions for 14_take_it_home."""

from ._frame import Question, no, yes

QUESTIONS = (
    Question(
        "Merged model or adapter file: what speaks for the adapter?",
        (
            no(
                "It runs faster.",
                "It is slower, a little: unmerged, each layer does more.",
            ),
            yes(
                "It is small, and one base serves many of them.",
                "Megabytes instead of gigabytes, and it can be switched off.",
            ),
            no(
                "It works on any base.",
                "On its own base only.",
            ),
        ),
    ),
    Question(
        "An export gives fluent nonsense in llama.cpp, and right answers in transformers. What was probably forgotten?",
        (
            yes(
                "The order of the rows of the query and key projections.",
                "Rotary embeddings pair other rows there. All shapes fit, nothing complains; attention is scrambled.",
            ),
            no(
                "The optimizer's state.",
                "It is for training only; no export has it.",
            ),
            no(
                "Quantisation.",
                "A file in float32 is as good as any.",
            ),
        ),
    ),
    Question(
        "A tool reads plain LoRA only, and you trained (IA)³. What can you do?",
        (
            no(
                "Rename peft_type to LORA in the config.",
                "The tensors have other names and shapes. At best the tool refuses.",
            ),
            yes(
                "Merge, and export the whole model; or turn it into a LoRA and look at the error.",
                "(IA)³ changes every row of the weight, so a low rank holds only part of it. `to_lora` says how much.",
            ),
            no(
                "Nothing: train again with LoRA.",
                "Not necessary: what can be merged is a weight like any other.",
            ),
        ),
    ),
    Question(
        "Why does this course read and write safetensors and never pickle?",
        (
            no(
                "Pickle files are larger.",
                "They are about as large.",
            ),
            no(
                "Pickle cannot hold tensors.",
                "torch.save has done so for years.",
            ),
            yes(
                "Opening a pickle runs whatever program its author put into it.",
                "A file of weights from a stranger should be numbers, nothing more.",
            ),
        ),
    ),
    Question(
        "You quantise the exported model to 8 bits. What has to be looked at before it is used?",
        (
            yes(
                "Whether its answers are still right, on the task's own test set.",
                "Each weight has moved. Usually little changes; the only way to know is to measure.",
            ),
            no(
                "Nothing: 8 bits are lossless.",
                "A block of 32 numbers shares a scale and has 255 levels. Most weights move.",
            ),
            no(
                "Whether the file has an even number of bytes.",
                "The container takes care of that.",
            ),
        ),
    ),
)
