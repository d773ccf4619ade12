"""Questions for 11_choosing_a_method."""

from ._frame import Question, no, yes

QUESTIONS = (
    Question(
        "Method A is on the Pareto front of quality and memory. What does that say?",
        (
            yes(
                "No other method is at least as good and at least as cheap, and better in one of the two.",
                "The best in quality is on it. So are methods that are worse, but cheaper than all better ones.",
            ),
            no(
                "It is the best compromise between quality and cost.",
                "The front ranks nobody: which of its points you take depends on what quality is worth to you.",
            ),
            no(
                "It is significantly better than the others.",
                "The front is drawn through means. Whether two points differ is a question for seeds and a test.",
            ),
        ),
    ),
    Question(
        "Two methods are compared at one and the same learning rate, because “that is fair”. What is wrong?",
        (
            no(
                "Nothing, as long as the number of steps is the same too.",
                "The rates at which methods learn best differ by factors of a hundred and more in our table.",
            ),
            no(
                "The rate should be the one of the paper.",
                "The paper had another model, batch and schedule. Its rate is where a search begins.",
            ),
            yes(
                "Each method has its own best rate. One rate favours the method that it suits.",
                "So a fair comparison gives each the same *search*: the same number of rates, tried on the valid set.",
            ),
        ),
        "in this course: `peftlab/lab`, and every table that it wrote",
    ),
    Question(
        "A table says LoRA 47.1 %, adapters 47.9 %, one run each. What follows?",
        (
            no(
                "Adapters are better by 0.8 points.",
                "In our table, three seeds of one method are often several points apart.",
            ),
            yes(
                "Nothing about which is better: the spread between seeds is not known.",
                "Repeat with other seeds, show the spread, and test the difference.",
            ),
            no(
                "They are equal.",
                "That would have to be shown too, with enough seeds to see a difference worth having.",
            ),
        ),
    ),
    Question(
        "“LoRA reaches the quality of full fine-tuning at 1 % of the cost.” Which cost comes nearest to that?",
        (
            no(
                "The time of a training step.",
                "It saves some of it: the gradients of the frozen weights. Forward and the rest of backward stay.",
            ),
            no(
                "The memory of training.",
                "It saves gradients and optimizer states of the base. The weights and the activations stay: lesson 09.",
            ),
            yes(
                "The trained parameters, and so the size of the file.",
                "5 % on our small base, below 1 % on a large one. What it is worth depends on how many you keep.",
            ),
        ),
    ),
)
