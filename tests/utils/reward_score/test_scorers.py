import pytest

from verl.utils.reward_score import SCORERS, check_data_source, compute_score, find_scorer
from verl.utils.reward_score.instructions import BOXED, DAPO_ANSWER, THINK_BOXED

# data_source -> ground truth of a row, a right response, a wrong one
ROWS = {
    "arithmetic": ("132", "21 31 #132", "21 31 #133"),
    "openai/gsm8k": ("72", "#### 72", "#### 27"),
    "lighteval/MATH": (r"\frac{1}{2}", r"\boxed{0.5}", r"\boxed{2}"),
    "DigitalLearningGmbH/MATH-lighteval": (r"x^2", r"\boxed{x\cdot x}", r"\boxed{2x}"),
    "HuggingFaceH4/MATH-500": (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", r"\boxed{\text{Debra}}"),
    "HuggingFaceH4/aime_2024": ("033", r"\boxed{33}", r"\boxed{34}"),
    "math_dapo": ("34", "Answer: 34", "Answer: 35"),
    "hiyouga/geometry3k": (r"5\sqrt{3}", r"\boxed{\sqrt{75}}", r"\boxed{75}"),
    "aime2024": ("204", r"\boxed{204}", r"\boxed{205}"),
    "AIME25": ("70", r"\boxed{70}", r"\boxed{7}"),
    "amc": ("142.0", r"\boxed{142}", r"\boxed{141}"),
    "amc23": ("27", r"\boxed{27}", r"\boxed{28}"),
    "math500": ("9", r"\boxed{9}", r"\boxed{-9}"),
    "minerva_math": ("4.5e33", r"\boxed{4.5\times 10^{33}}", r"\boxed{4.5\times 10^{32}}"),
    "olympiadbench": ("$2^{1009}$", r"\boxed{2^{1009}}", r"\boxed{2^{1008}}"),
}


@pytest.mark.parametrize("data_source", ROWS)
def test_a_data_source_finds_its_scorer(data_source):
    ground_truth, right, wrong = ROWS[data_source]
    assert compute_score(data_source, right, ground_truth)["acc"] == 1
    assert compute_score(data_source, wrong, ground_truth)["acc"] == 0


def test_every_registered_text_scorer_has_a_row_here():
    assert set(SCORERS) - set(ROWS) == {"livecodebench"}


def test_livecodebench_has_a_scorer_that_is_loaded_late():
    check_data_source("livecodebench")
    assert find_scorer("livecodebench/code_generation_lite") is SCORERS["livecodebench"]


@pytest.mark.parametrize(
    ("data_source", "nearest"),
    [("geometry3k", "hiyouga/geometry3k"), ("gsm8k", "openai/gsm8k"), ("aritmetic", "arithmetic")],
)
def test_unknown_data_source_lists_the_known_ones_and_names_the_nearest(data_source, nearest):
    with pytest.raises(
        ValueError, match=f"data_source '{data_source}'; there are .*the nearest is '{nearest}'"
    ) as error:
        compute_score(data_source, "", "")
    assert "\n" not in str(error.value)


def test_an_answer_in_the_form_that_the_prompt_asks_for_is_read():
    assert "\\boxed{}" in BOXED and "\\boxed{}" in THINK_BOXED and "Answer: $Answer" in DAPO_ANSWER
    boxed = BOXED.partition("within ")[2].replace("{}", "{72}")  # "\boxed{72}."
    line = next(part for part in DAPO_ANSWER.split("form ") if part.startswith("Answer:"))
    for source in ("openai/gsm8k", "lighteval/MATH", "math_dapo", "hiyouga/geometry3k"):
        assert compute_score(source, f"So it is {boxed}", "72")["acc"] == 1
    assert (
        compute_score("math_dapo", "So it is\n" + line.replace("$Answer", "72")[: len("Answer: 72")], "72")["acc"] == 1
    )
    thought = f"<think>12 * 6</think> It is {boxed}"
    assert compute_score("hiyouga/geometry3k", thought, "72")["score"] == pytest.approx(1)


def test_gsm8k_answer_is_the_last_number_in_a_box_or_after_the_marker():
    def read(response):
        return compute_score("openai/gsm8k", response, "1234")["pred"]

    for response in [
        "#### 1234",
        "####1,234",
        "#### $1,234.00",
        "#### 1234.",
        "#### 1234 clips",
        "#### x = 1234",
        "12 * 2 = 24\n#### 7\nNo.\n#### 1234",
        r"\boxed{7} #### 1234",
        r"#### 7 \boxed{1234}",
        r"#### \boxed{1234}",
        r"\boxed{1{,}234\text{ dollars}}",
        r"$\boxed{\$1,234}$",
        r"\boxed{1000 + 234 = 1234}",
        "#### １２３４",
        "#### **1234**",
        r"\boxed{\$1,234 \text{ per week}}",
        r"\boxed{\$1234\text{ dollars}}",
        r"\boxed{\$1.234 \text{ thousand}}",
        r"\boxed{1234\$}",
        "\\boxed{1234}.\n#### ",
        "#### 1234\n#### Explanation of the steps",
    ]:
        assert read(response) == "1234", response
    assert read("#### -5") == "-5"
    assert read("#### 2.50") == "5/2"
    for response in [
        "",
        "1234",
        "The answer is 1234",
        "####",
        "#### many",
        "#### 12 or 34",
        r"\boxed{1234",
        "#### 1234/0",
    ]:
        assert read(response) is None, response


def test_gsm8k_scores_one_or_zero():
    assert compute_score("openai/gsm8k", "#### 1,234", "1234") == {"score": 1.0, "acc": 1.0, "pred": "1234"}
    assert compute_score("openai/gsm8k", "#### 1,235", "1234") == {"score": 0.0, "acc": 0.0, "pred": "1235"}
    assert compute_score("openai/gsm8k", "so 1,234", "1234") == {"score": 0.0, "acc": 0.0, "pred": None}
    with pytest.raises(ValueError, match="ground_truth 'five' of data_source 'openai/gsm8k' is not a number"):
        compute_score("openai/gsm8k", "#### 5", "five")


def test_dapo_scores_one_or_minus_one():
    assert compute_score("math_dapo", "Answer: 34", "34") == {"score": 1.0, "acc": 1.0, "pred": "34"}
    assert compute_score("math_dapo", r"\boxed{34}", 34) == {"score": 1.0, "acc": 1.0, "pred": "34"}
    assert compute_score("math_dapo", "Answer: 35", "34") == {"score": -1.0, "acc": 0.0, "pred": "35"}
    assert compute_score("math_dapo", "We get 34 and", "34") == {"score": -1.0, "acc": 0.0, "pred": None}


@pytest.mark.parametrize(
    ("response", "acc", "formatted"),
    [
        (r"<think>60 - 4</think> \boxed{56}", 1, 1),
        ("\n<think>\n60 - 4\n</think>\n\nSo $\\boxed{56^\\circ}$.", 1, 1),
        (r"\boxed{56}", 1, 0),
        (r"<think>60 - 4</think> \boxed{55}", 0, 1),
        (r"<think>\boxed{56}</think>", 1, 0),
        (r"<think>60 - 4 \boxed{56}", 1, 0),
        (r"Well, <think>60 - 4</think> \boxed{56}", 1, 0),
        (r"<think>a</think><think>b</think> \boxed{56}", 1, 0),
        (r"<think>a</think> </think> \boxed{56}", 1, 0),
        (r"<think>60 - 4</think> \boxed{56", 0, 0),
        ("", 0, 0),
    ],
)
def test_geometry3k_scores_nine_tenths_answer_and_one_tenth_format(response, acc, formatted):
    result = compute_score("hiyouga/geometry3k", response, "56")
    assert (result["acc"], result["format"]) == (acc, formatted)
    assert result["score"] == pytest.approx(0.9 * acc + 0.1 * formatted)


@pytest.mark.parametrize(
    ("tolerance", "answer", "right"),
    [
        (None, "3.2", 0),
        ("1e-1", "3.2", 1),
        ("1e-1", "3.3", 0),
        ("0.5", "\\sqrt{10}", 1),
        ("0.5", "x", 0),
        ("0.5", "3, 3", 0),
    ],
)
def test_a_number_may_be_off_by_the_published_tolerance(tolerance, answer, right):
    info = {"tolerance": tolerance}
    assert compute_score("olympiadbench", f"\\boxed{{{answer}}}", "3.14", info)["score"] == right


def test_a_list_may_have_a_tolerance_for_each_of_its_numbers():
    info = {"tolerance": "0.1, 1"}
    assert compute_score("olympiadbench", "\\boxed{2.05, 7.5}", "2, 7", info)["score"] == 1
    assert compute_score("olympiadbench", "\\boxed{2.5, 7.05}", "2, 7", info)["score"] == 0


@pytest.mark.parametrize("ground_truth", ["", " ", "$$", r"\boxed{}", "1" * 3000, ["5"], None])
def test_a_ground_truth_without_an_answer_is_refused(ground_truth):
    with pytest.raises(ValueError, match="of data_source 'math_dapo' is no answer"):
        compute_score("math_dapo", "Answer: 5", ground_truth)


def test_numbers_in_several_forms_count_as_one_in_a_vote():
    responses = [r"\boxed{\frac12}", r"\boxed{0.5}", r"Answer: x = 0.50", r"\boxed{\dfrac{2}{4}\text{ cm}}"]
    assert {compute_score("lighteval/MATH", response, "7")["pred"] for response in responses} == {"1/2"}
