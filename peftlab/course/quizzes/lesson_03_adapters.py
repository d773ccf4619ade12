"""Questions for 03_adapters."""

from ._frame import Question, no, yes

QUESTIONS = (
    Question(
        "Why does an adapter keep h and add to it, rather than put its own answer in the place of h?",
        (
            no(
                "Because the bottleneck needs h as its input.",
                "It reads h either way. The question is what becomes of h behind it.",
            ),
            yes(
                "So that with W_up = 0 the model is the base, and training starts from there.",
                "The sum h + 0 is h. Without the way around, a fresh adapter would let nothing through but noise.",
            ),
            no(
                "Because a sum needs fewer parameters.",
                "The sum h + … has no parameters, and leaving it out would save none.",
            ),
        ),
        "Houlsby et al. 2019, arXiv:1902.00751, section 2.1",
    ),
    Question(
        "What keeps a Houlsby adapter from being merged into the weights?",
        (
            yes(
                "The bend between its two matrices.",
                "With σ(x) = x, the adapter is h + W_up W_down h, and (1 + W_up W_down) W is a weight. The lesson "
                "merged such a one.",
            ),
            no(
                "That it comes after the layer rather than beside it.",
                "Two linear maps in a row are one: (1 + W_up W_down) W. The place is not what prevents it.",
            ),
            no(
                "Its biases.",
                "A bias can be folded into the layer's own. The merge of lesson 02 handles biases.",
            ),
        ),
    ),
    Question(
        "Houlsby with a bottleneck of 8, or Pfeiffer with a bottleneck of 16. Which trains more parameters?",
        (
            no(
                "Houlsby, about twice as many, for it has two adapters a block.",
                "It has twice the adapters, and each is half as wide.",
            ),
            no(
                "Pfeiffer, about twice as many, for its bottleneck is twice as wide.",
                "Its adapters are twice as large, and it has half as many of them.",
            ),
            yes(
                "About the same: the matrices have as many entries, and the biases differ a little.",
                "2 · (2·D·8 + 8 + D) beside 2·D·16 + 16 + D: the difference is one bias of width D a block.",
            ),
        ),
    ),
    Question(
        "A Compacter weight has 768 × 24 entries. How can 792 numbers (and a few shared ones) make them?",
        (
            no(
                "The other entries are zero.",
                "A sum of Kronecker products of full factors has hardly a zero in it.",
            ),
            yes(
                "They repeat small patterns: a sum of Kronecker products of small factors.",
                "Each term puts a copy of the small sᵢ tᵢ into every place of Aᵢ, times its entry there.",
            ),
            no(
                "They are stored in 4 bits.",
                "All numbers are ordinary ones. There are fewer of them.",
            ),
        ),
        "Karimi Mahabadi et al. 2021, arXiv:2106.04647, section 4",
    ),
    Question(
        "AdapterFusion of an adapter for SQL and one for reviews: what is trained?",
        (
            no(
                "Both adapters, with a third set of weights.",
                "The adapters stay frozen; what they learned is what fusion is to use.",
            ),
            no(
                "One number per adapter: how much it counts.",
                "That would be the same mixture for every token. Here each token asks anew.",
            ),
            yes(
                "Q, K and V of an attention over the adapters, at each site.",
                "3·D² a site, however many adapters are fused. That is far more than the adapters have themselves.",
            ),
        ),
        "Pfeiffer et al. 2021, arXiv:2005.00247, section 3.2",
    ),
    Question(
        "“Adapters add no latency, because they are so small.” What is to be said about that?",
        (
            yes(
                "Their size is not what takes the time: they are further steps, one after the other.",
                "For one token at a time, starting a product takes longer than computing it. Rücklé et al. (2021) "
                "measured 4–6 % at inference on GPUs; Hu et al. (2021) up to 30 % for one short text on GPT-2 medium.",
            ),
            no(
                "It is true: a few percent of the parameters take a few percent of the time.",
                "Time goes with the number of steps as well as with their size, most of all for short inputs.",
            ),
            no(
                "It is true after merging.",
                "That is LoRA. An adapter with a bend has no merged form.",
            ),
        ),
        "Hu et al. 2021, arXiv:2106.09685, table 1; Rücklé et al. 2021, arXiv:2010.11918",
    ),
)
