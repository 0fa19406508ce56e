"""What is public: names, signatures, docstrings, doctests, typing, what an import costs."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastloss
from fastloss import files, functional, gradients, modules, objectives, streaming

PUBLIC = sorted(fastloss.__all__)
MODULE_NAMES = sorted(
    info.name
    for info in pkgutil.walk_packages(fastloss.__path__, "fastloss.")
    if not info.name.rpartition(".")[2].startswith("__")
)

LOSS_OPTIONS = {
    "weight": None,
    "size_average": None,
    "ignore_index": -100,
    "reduce": None,
    "reduction": "mean",
}
SIGNATURES = {
    "cross_entropy": LOSS_OPTIONS | {"label_smoothing": 0.0},
    "CrossEntropyLoss": LOSS_OPTIONS | {"label_smoothing": 0.0},
    "nll_loss": LOSS_OPTIONS,
    "NLLLoss": LOSS_OPTIONS,
    "kl_div": {"size_average": None, "reduce": None, "reduction": "mean", "log_target": False},
    "KLDivLoss": {"size_average": None, "reduce": None, "reduction": "mean", "log_target": False},
    "Softmax": {"dim": -1},
    "LogSoftmax": {"dim": -1},
}


class TestNames:
    def test_all_is_what_the_modules_define(self):
        assert set(PUBLIC) == set(functional.__all__) | set(gradients.__all__) | set(modules.__all__) | {"score_file"}
        assert fastloss.__all__ == sorted(fastloss.__all__)

    @pytest.mark.parametrize("module", [functional, gradients, modules, objectives], ids=lambda m: m.__name__)
    def test_a_module_lists_every_public_name_it_defines(self, module):
        defined = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
        }
        assert defined == set(module.__all__)

    def test_the_package_has_no_logic(self):
        source = ast.parse(Path(fastloss.__file__).read_text(encoding="utf-8"))
        allowed = (ast.Expr, ast.ImportFrom, ast.Assign)
        assert all(isinstance(node, allowed) for node in source.body)

    def test_star_import(self):
        names = {}
        exec("from fastloss import *", names)
        assert set(PUBLIC) <= set(names)

    def test_version(self):
        assert all(part.isdigit() for part in fastloss.__version__.split(".")[:2])


class TestSignatures:
    @pytest.mark.parametrize("name", SIGNATURES)
    def test_options_their_order_and_defaults(self, name):
        parameters = inspect.signature(getattr(fastloss, name)).parameters
        options = {p.name: p.default for p in parameters.values() if p.name not in ("input", "target")}
        assert list(options.items()) == list(SIGNATURES[name].items())
        if name.islower():
            assert list(parameters)[:2] == ["input", "target"]

    @pytest.mark.parametrize(
        ("name", "positional", "keywords"),
        [
            ("softmax", ["input", "axis"], ["dim"]),
            ("log_softmax", ["input", "axis"], ["dim"]),
            ("logsumexp", ["input", "axis", "keepdims"], ["dim", "keepdim"]),
        ],
    )
    def test_both_spellings(self, name, positional, keywords):
        parameters = inspect.signature(getattr(fastloss, name)).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
        assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == keywords

    @pytest.mark.parametrize("name", PUBLIC)
    def test_everything_is_annotated(self, name):
        value = getattr(fastloss, name)
        function = value.__init__ if inspect.isclass(value) else value
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
        assert all(p.annotation is not p.empty for p in parameters)
        assert inspect.signature(function).return_annotation is not inspect.Signature.empty

    def test_the_package_is_marked_as_typed(self):
        assert (Path(fastloss.__file__).parent / "py.typed").is_file()


class TestDocumentation:
    @pytest.mark.parametrize("name", PUBLIC)
    def test_sections(self, name):
        value = getattr(fastloss, name)
        documentation = inspect.getdoc(value)
        sections = ["Parameters", "Raises", "See Also", "Examples"]
        if not inspect.isclass(value):
            sections += ["Returns", "Notes"]
        for section in sections:
            assert f"\n{section}\n{'-' * len(section)}\n" in documentation

    @pytest.mark.parametrize("name", PUBLIC)
    def test_every_parameter_is_described(self, name):
        value = getattr(fastloss, name)
        section = inspect.getdoc(value).partition("Parameters\n")[2].partition("\n\n")[0]
        headings = [line.partition(" : ")[0] for line in section.splitlines()[1:] if not line.startswith(" ")]
        described = [part for heading in headings for part in heading.split(", ")]
        assert sorted(described) == sorted(inspect.signature(value).parameters)

    @pytest.mark.parametrize("name", MODULE_NAMES)
    def test_every_module_says_what_it_is_for(self, name):
        source = Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8")
        assert not source.strip() or ast.get_docstring(ast.parse(source))

    @pytest.mark.parametrize(
        "module",
        [fastloss, files, functional, gradients, modules, objectives, streaming],
        ids=lambda m: m.__name__,
    )
    def test_examples_run(self, module):
        results = doctest.testmod(module)
        assert results.failed == 0
        assert results.attempted > 0 or module is fastloss

    @pytest.mark.parametrize("name", PUBLIC)
    def test_every_public_name_has_an_example(self, name):
        tests = doctest.DocTestFinder(recurse=False).find(getattr(fastloss, name), name)
        assert any(name in example.source for test in tests for example in test.examples)


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


class TestImport:
    def test_does_not_import_numba(self):
        code = (
            "import sys, fastloss; print([m for m in ('numba', 'llvmlite', 'torch', 'ml_dtypes') if m in sys.modules])"
        )
        result = run_python(code)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == "[]"

    def test_errors_and_classes_do_not_either(self):
        """Checks come first: a malformed call is answered before anything is compiled."""
        code = """
import sys, fastloss
fastloss.CrossEntropyLoss(label_smoothing=0.1)
try:
    fastloss.cross_entropy([[1.0, 2.0]], [0], reduction="max")
except ValueError:
    print("numba" in sys.modules)
"""
        result = run_python(code)
        assert result.stdout.strip() == "False", result.stderr

    def test_numba_is_imported_by_the_kernels_and_what_runs_and_keeps_them(self):
        package = Path(fastloss.__file__).parent
        importers = set()
        for path in package.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if any(name.split(".")[0] in ("numba", "llvmlite") for name in names):
                    importers.add(path.relative_to(package).as_posix())
        assert {name for name in importers if not name.startswith("_kernels/")} <= {"_runtime.py", "_cache.py"}
        assert "_kernels/_jit.py" in importers
