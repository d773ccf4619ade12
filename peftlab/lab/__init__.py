"""The laboratory: experiments of many training runs, recorded one row per run, and what they say.

    runs = lab.read("classic")                         # a pandas table of data/results/classic.csv
    lab.summary(runs, by=["task", "method"])           # rate chosen on VALID; TEST: mean, low, high over the seeds
    picked = lab.chosen(runs, by=["task", "method"])   # the rows at the chosen rates
    lab.compare_methods(picked, "LoRA", "full", "test_accuracy")   # difference, 95 % interval, exact p

An experiment is data: cases (a method on a task, a rank, …) and a function that does one run. For each case, learning
rates are tried with the first seed and judged on the VALID set; a best rate at the edge of the grid extends the grid.
The other seeds then run at the best rate. The TEST set is never used to choose anything.

Each finished run is one row of a CSV file, written at once, so that a killed experiment goes on where it was: at most
the runs in flight are lost. A row counts as done only for the settings that it was made with; made with others, it is
run again and replaced. To run something again, delete its row.

`plan` says what is to be run, `table` reads and writes rows, `engine` does the runs (`cluster` through Ray), and
`statistics` says what can be claimed of them. `commands` is what their programs have in common; `timing` is for works
whose times are compared.
"""

from .commands import add_steps, at_least, carry_out, options
from .engine import ENGINES, conduct, fitting_jobs, last, time_left, train_run, work
from .plan import (
    ORIGIN,
    Case,
    Experiment,
    Row,
    Run,
    best,
    find,
    left,
    left_of,
    pending,
    tried,
    wanted,
    without_old,
)
from .statistics import (
    Comparison,
    Interval,
    bootstrap,
    chosen,
    compare,
    compare_methods,
    holm,
    seeds_range,
    summary,
)
from .table import (
    RESULTS,
    budget,
    config_hash,
    costs,
    fingerprint,
    fingerprints,
    made,
    markdown,
    measured_row,
    put,
    read,
    rows_of,
    write,
)
from .timing import CLOCKS, machine, quartiles, ratios, report, spread, stopwatch, take_turns, timing_options

__all__ = [
    "CLOCKS", "ENGINES", "ORIGIN", "RESULTS", "Case", "Comparison", "Experiment", "Interval", "Row", "Run",
    "add_steps", "at_least", "best", "bootstrap", "budget", "carry_out", "chosen", "compare", "compare_methods",
    "conduct", "config_hash", "costs", "find", "fingerprint", "fingerprints", "fitting_jobs", "holm", "last",
    "left", "left_of", "machine", "made", "markdown", "measured_row", "options", "pending", "put", "quartiles",
    "ratios", "read", "report", "rows_of", "seeds_range", "spread", "stopwatch", "summary", "take_turns",
    "time_left", "timing_options", "train_run", "tried", "wanted", "without_old", "work", "write",
]  # fmt: skip
