"""The claims audit: every claim has its own function that finds out, and the verdicts are what they are."""

import inspect
from collections import Counter

import pytest

from peftlab.course import claims
from peftlab.course.claims import CLAIMS, TEXTS, TOPICS, audit, kind, table

# The verdicts that counting and arithmetic give. A changed one is a changed statement of the course.
VERDICTS = {
    "one_matrix": "holds", "llama_printed": "holds", "ten_thousand_times": "wrong", "thirty_million": "holds",
    "below_one_percent": "holds if", "tenth_to_one_percent": "holds if", "seven_to_seventy_million": "holds if",
    "bitfit_share": "holds if", "bitfit_lightest": "wrong", "full_is_everything": "holds", "shapes_of_a_and_b": "wrong",
    "merging_without_scale": "holds if", "adapters_between_layers": "holds if", "prefix_place": "holds if",
    "running_locally": "holds if", "only_new_ones": "holds if", "qlora_formats": "holds", "impossible": "wrong",
    "swapping": "holds", "faster": "holds", "hours_not_days": "holds if",
    "adapter_megabytes": "holds if", "seventy_on_disk": "holds", "ten_tasks": "holds",
    "eighty_gigabytes": "holds if", "sixteen_gigabytes": "holds", "qlora_65b": "holds if",
    "one_percent_of_the_cost": "wrong",
    "no_latency": "holds if", "forgetting": "holds if", "stability": "wrong", "most_are_frozen": "wrong",
    "full_forgets": "holds",
}  # fmt: skip


@pytest.mark.parametrize("one", CLAIMS, ids=lambda one: one.name)
def test_claim(one):
    found, verdict = one.check()  # asserts its own numbers
    assert "    assert " in inspect.getsource(one.check)
    assert one.texts and set(one.texts) <= set(TEXTS) and one.topic in TOPICS
    assert 10 < len(one.says) < 160 and len(found) > 20
    assert kind(verdict) == VERDICTS.get(one.name, kind(verdict))


def test_every_text_and_topic_is_audited():
    assert set(VERDICTS) <= {one.name for one in CLAIMS} and len({one.name for one in CLAIMS}) == len(CLAIMS)
    assert min(Counter(text for one in CLAIMS for text in one.texts).values()) >= 6
    assert {one.topic for one in CLAIMS} == set(TOPICS)
    assert sum(len(audit(topic)) for topic in TOPICS) == len(CLAIMS)
    with pytest.raises(ValueError, match="no claims on 'cats'; the topics are how many"):
        audit("cats")


@pytest.mark.parametrize(
    "name, numbers",
    [
        ("one_matrix", ["16,777,216", "65,536", "99.61 %"]),
        ("llama_printed", ["4,194,304", "6,742,609,920", "0.0622 %"]),
        ("ten_thousand_times", ["7,000 times", "9,251 times", "4,306 times", "11,483 with r = 3"]),
        ("only_new_ones", ["102,144 biases", "38,400"]),
        ("faster", ["0.75 as the LoRA paper"]),
        ("thirty_million", ["29,982,720", "225 times"]),
        ("seventy_on_disk", ["138 GB", "141 GB"]),
        ("ten_tasks", ["10 tasks 89.8 %"]),
    ],
)
def test_the_numbers_of_the_texts(name, numbers):
    """Again by hand: 4096², 8·8192, 32·2·8·8192; 70e9/10e6; 175e9/(96·2·4·24576); 70.6e9/(80·3·(16384 + 9216));
    12·(2304 + 768 + 3072 + 768 + 2·768) + 768 and 25·1536; 32.5/43.1; 1 − (138 + 10·0.207)/1380."""
    found = next(one for one in CLAIMS if one.name == name).check().found
    assert all(number in found for number in numbers), found


def test_the_table_is_one_row_a_claim():
    text = table(audit("how many")).data
    rows = text.splitlines()
    assert len(rows) == 2 + len(audit("how many")) and all(row.count(" | ") == 3 for row in rows if row[2] != "-")
    assert claims.audit("disk") is claims.audit("disk"), "found out once"
