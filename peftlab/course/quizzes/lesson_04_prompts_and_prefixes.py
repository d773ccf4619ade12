"""Questions for 04_prompts_and_prefixes."""

from ._frame import Question, no, yes

QUESTIONS = (
    Question(
        "What is trained in prompt tuning with k = 20 on a model of width d?",
        (
            no(
                "Twenty words, which are chosen from the vocabulary.",
                "Words cannot be changed by a small step along a gradient. The vectors that stand for them can.",
            ),
            yes(
                "Twenty vectors of width d, which need not be the vector of any token.",
                "They stand where embedded tokens would stand: 20·d numbers, whatever the depth of the model.",
            ),
            no(
                "Twenty new rows of the embedding, and the output head's.",
                "The embedding and the head stay frozen. No token id stands for a soft prompt, so none can be written.",
            ),
        ),
        "Lester et al. 2021, arXiv:2104.08691, section 2",
    ),
    Question(
        "A trained prompt's nearest tokens read like nonsense. What follows?",
        (
            no(
                "Training has failed.",
                "Its loss says whether it failed. Vectors that work well can lie far from all tokens.",
            ),
            no(
                "The nonsense is what the model needs to read.",
                "Put those tokens in the prompt's place and measure: the lesson did, and they are another prompt.",
            ),
            yes(
                "Little: nearest tokens are no translation of a prompt.",
                "Prompts can even be trained to lie near a text of your choice and still do the task.",
            ),
        ),
        "Khashabi et al. 2021, arXiv:2112.08348",
    ),
    Question(
        "Why can no prompt or prefix be merged into the weights?",
        (
            yes(
                "It acts through attention: a softmax of the input decides what it adds, which no fixed matrix does.",
                "An adapter can be merged if the adapted layer is an affine map of its input. This one is not.",
            ),
            no(
                "Its shapes do not fit.",
                "Shapes are the least of it: there is no matrix of any shape that would give the same outputs.",
            ),
            no(
                "It could be; the libraries have not written it yet.",
                "What a head takes from the prefix is a ratio of exponentials of the input. No matrix computes that.",
            ),
        ),
    ),
    Question(
        "Llama-3.2-3B has 24 query heads and 8 key/value heads of width 128. How wide is a trained key of the prefix "
        "in one layer?",
        (
            no(
                "3072, the width of the model.",
                "That is the queries' width. With grouped queries, three of them share one key.",
            ),
            no(
                "128, the width of a head.",
                "That is one head's part, and there are eight key/value heads.",
            ),
            yes(
                "1024 = 8 · 128.",
                "d_kv: the width that the cache holds. Counting with 3072 would give three times too many parameters.",
            ),
        ),
    ),
    Question(
        "A prompt hardly learns at the learning rate that was best for LoRA. What is the first thing to try?",
        (
            yes(
                "A higher rate, and a start at token vectors.",
                "Adam moves an entry by about the rate per step, and a vector may have a long way to go.",
            ),
            no(
                "A much longer prompt.",
                "Possibly later. Each vector would still move as slowly, and each takes a position of the context.",
            ),
            no(
                "Another method: prompts do not work on small models.",
                "They do lose more on small models, but a rate that was tuned for another method shows nothing.",
            ),
        ),
        "Lester et al. 2021, arXiv:2104.08691, sections 3 and 3.2",
    ),
    Question(
        "Twenty prompt vectors, and a context of 512 positions. What do they cost when the model is used?",
        (
            no(
                "Nothing: they are only needed in training.",
                "They cannot be merged, so they are read anew with each text.",
            ),
            yes(
                "20 of the 512 positions, their part of the cache, and the attention of each token to them.",
                "A prefix costs the same of these: each layer's keys and values for k positions.",
            ),
            no(
                "20 of the 4096 tokens of the vocabulary.",
                "The vocabulary is untouched: they are positions of the text, not tokens.",
            ),
        ),
    ),
)
