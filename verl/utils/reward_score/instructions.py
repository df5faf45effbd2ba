"""The sentence at the end of a prompt that says how to give the answer: what the verifiers of this package read.

The data scripts append these, and the tests of the verifiers answer in these forms, so that a prompt never asks for a
form that its verifier does not read. Which form belongs to which data source:

    BOXED        gsm8k.py (which also reads `#### n`) and math.py
    DAPO_ANSWER  dapo.py (which also reads \\boxed{})
    THINK_BOXED  geometry3k.py (which gives the format its own share of the score)
"""

BOXED = "Reason step by step, and put your final answer within \\boxed{}."

DAPO_ANSWER = (
    "Reason step by step. The last line of your response must have the form Answer: $Answer (without quotes), "
    "where $Answer is the answer to the problem."
)

THINK_BOXED = (
    "First think through the problem; write this reasoning between <think> and </think>. "
    "Then give the final answer within \\boxed{}."
)
