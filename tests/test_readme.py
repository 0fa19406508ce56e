"""What the README shows is what happens."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def section(title):
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def examples(text):
    """Code, and what the README says that it prints."""
    return re.findall(r"```python\n(.*?)```.*?```text\n(.*?)```", text, re.DOTALL)


def test_first_example_prints_what_the_readme_says():
    code, expected = examples(README)[0]
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


@pytest.mark.parametrize("number", range(3), ids=["streams", "files", "cluster"])
def test_examples_of_data_larger_than_memory(number, tmp_path):
    code, expected = examples(section("Larger than memory"))[number]
    for module in re.findall(r"^(?:import|from) (dask|distributed)", code, re.MULTILINE):
        pytest.importorskip(module)
    script = tmp_path / "example.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path
    )
    assert done.stdout == expected


def test_the_objective_runs(capfd):
    pytest.importorskip("xgboost")
    (code,) = re.findall(r"```python\n(import numpy as np\nimport xgboost.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "test-cross_entropy" in "".join(capfd.readouterr())


def test_set_up_has_two_one_line_commands():
    commands = re.findall(r"```\n(.*?)```", section("Set up"), re.DOTALL)
    assert [command.count("\n") for command in commands] == [1, 1]
