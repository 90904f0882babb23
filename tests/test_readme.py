"""The README's code does what the README says."""

import pathlib
import re


def test_the_ten_lines_run_and_the_reward_rises(capsys):
    readme = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
    ten_lines = re.search(r"## Ten lines\n+```python\n(.*?)```", readme, re.DOTALL).group(1)
    exec(ten_lines, {})
    assert float(capsys.readouterr().out) > 0.8
