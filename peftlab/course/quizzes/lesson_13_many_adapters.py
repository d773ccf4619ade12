"""Questions for 13_many_adapters."""

from ._frame import Question, no, yes

QUESTIONS = (
    Question(
        "What do the rows of a mixed batch share?",
        (
            yes(
                "The base's layers: one pass through them for all rows.",
                "That is most of the work. The factors A and B are gathered for each row and multiplied as a batch.",
            ),
            no(
                "Everything: the adapters are averaged first.",
                "Then every user would get the same answer. Each row has its own.",
            ),
            no(
                "Nothing; it is a loop over the adapters.",
                "That is how it can be done, too, and the time then grows with the number of adapters.",
            ),
        ),
        "Chen et al. 2023, Punica, arXiv:2310.18547",
    ),
    Question(
        "Which method cannot be in a mixed batch here?",
        (
            no(
                "LoRA with another rank per user.",
                "The shorter factors are filled up with zeros.",
            ),
            no(
                "(IA)³.",
                "Its rows are computed apart and put back in their place; slower, but right.",
            ),
            yes(
                "Prompt tuning.",
                "It makes the sequence longer, for the whole batch at once. `using` refuses it, by name.",
            ),
        ),
    ),
    Question(
        "1,000 adapters lie on disk, 16 fit in memory. What decides how many requests wait for a load?",
        (
            yes(
                "How unevenly users ask.",
                "If a few are asked for most of the time, nearly every request finds its adapter in memory.",
            ),
            no(
                "How large the store's index is.",
                "It is read once, and is a small file. What is slow is reading an adapter that is not in memory.",
            ),
            no(
                "The size of the base.",
                "It is there once, whatever is asked for.",
            ),
        ),
    ),
    Question(
        "Why are two names for adapters that differ in case only (`Anna`, `anna`) refused by a store?",
        (
            no(
                "Python's dictionaries do not tell them apart.",
                "They do. It is the disk that may not.",
            ),
            yes(
                "On macOS and Windows both would be the same folder.",
                "One user's adapter would silently take the place of the other's.",
            ),
            no(
                "Users would mix them up.",
                "They may. What matters is that no file is overwritten.",
            ),
        ),
    ),
    Question(
        "A server gets a request for an adapter that it does not know. What should it answer?",
        (
            no(
                "The base's answer: better than nothing.",
                "Worse than nothing: the client believes that its adapter answered.",
            ),
            no(
                "500, internal error.",
                "The server is well; the request is wrong. 5xx makes clients try again.",
            ),
            yes(
                "404, with the name, and a name that was probably meant.",
                "Whoever reads it knows what to change. Nothing else is disturbed.",
            ),
        ),
    ),
)
