"""What the README shows is what happens."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_first_example_prints_what_the_readme_says():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    expected = re.search(r"```text\n(.*?)```", README, re.DOTALL).group(1)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == expected


def test_the_logistic_regression_has_the_coefficients_of_scikit_learn():
    section = README.split("### Gradients\n")[1].split("\n### ")[0]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    expected = re.search(r"```text\n(.*?)```", section, re.DOTALL).group(1)
    printed, names = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), names)
    assert printed.getvalue() == expected
    np.testing.assert_allclose(names["result"].x.reshape(3, 14)[:, :-1], names["model"].coef_, atol=1e-4)


def test_set_up_has_two_one_line_commands():
    section = README.split("## Set up\n")[1].split("\n## ")[0]
    commands = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    assert [command.count("\n") for command in commands] == [1, 1]
