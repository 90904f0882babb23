"""The reward for one language."""

import pytest
from calls import score

from grpo_jax import rewards


@pytest.mark.parametrize(
    ("written", "script", "expected"),
    [
        ("abc", "Latin", 1),
        ("abc", "LATIN", 1),
        ("abc中", "Latin", 0.75),
        ("abc中", "CJK", 0.25),
        ("Straße, déjà vu: 42!", "latin", 1),
        ("Привет ab", "Cyrillic", 0.75),
        ("３ ａｂ", "Latin", 1),
        ("日本ごカナ", ("CJK", "Hiragana", "Katakana"), 1),
        ("日本ごカナ", ("Hiragana",), 0.2),
        ("<think>中</think><answer>文</answer>", "CJK", 1),
        ("<b>中</b>", "CJK", 1 / 3),
        ("1+2=3 ✓", "Latin", 0),
        ("", "Latin", 0),
    ],
    ids=str,
)
def test_language_is_the_share_of_letters_of_the_script(written, script, expected):
    assert score(rewards.language_consistency(script=script), written) == pytest.approx(expected)


@pytest.mark.parametrize("script", ["Latn", "", (), ("Latin", "Elvish")], ids=str)
def test_a_script_that_no_letter_has_is_refused(script):
    with pytest.raises(ValueError, match=r"no letter has the script '\w*' in its Unicode name"):
        rewards.language_consistency(script=script)
