"""Print the counts by which the size and the shape of the code are judged.

``python -m tools.house`` counts what the files say, ``python -m tools.house steps`` also what runs: files and calls of
the package in the second of two training steps and rollouts on the tiny world, and files that ``latentreward score``
executes for three pictures. Nothing is left out.
"""

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "latentreward"
SOURCES = [*sorted(PACKAGE.rglob("*.py")), *sorted((ROOT / "callbacks").rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
IGNORED = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}


def code_and_comments(text: str) -> tuple[int, int]:
    """Count the lines of a file that hold code, docstrings left out, and those that hold a comment."""
    strings = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    code, comments = set[int](), set[int]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in IGNORED:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - strings), len(comments)


def spanned(node: ast.stmt) -> int:
    """Count the lines of a statement."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def deepest_module(nodes: list[ast.AST]) -> tuple[int, str]:
    """Return the most classes of ours down to a LightningModule, and one that has them."""
    bases = {
        node.name: [ast.unparse(base).split("[")[0] for base in node.bases]
        for node in nodes
        if isinstance(node, ast.ClassDef)
    }

    def way(name: str) -> list[str]:
        """Return the classes from a class to LightningModule, by the longest way."""
        ways = [[base] if base == "LightningModule" else way(base) for base in bases.get(name, ())]
        return max(([name, *one] for one in ways if one), key=len, default=[])

    longest = max((way(name) for name in bases), key=len)
    return len(longest) - 1, longest[0]


def print_sources() -> None:
    """Print the counts of src/ and callbacks/."""
    texts = [path.read_text() for path in SOURCES]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    lines = sum(len(text.splitlines()) for text in texts)
    code, comments = map(sum, zip(*map(code_and_comments, texts), strict=True))
    raises = sum(isinstance(node, ast.Raise) for node in nodes)
    imports = sum(spanned(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom))
    short = sum(len(text.splitlines()) < 60 for text in texts)
    top = [path for path in PACKAGE.iterdir() if "__" not in path.name and not path.name.endswith((".pyi", ".typed"))]
    depth, deepest = deepest_module(nodes)
    print(f"src + callbacks: {lines:,} lines, {code:,} of them code, in {len(SOURCES)} files, {short} below 60 lines")
    folders = sum(path.is_dir() for path in top)
    print(f"  at the top of the package: {folders} folders, {len(top) - folders} files")
    print(f"  raise: {raises:,}, for 1,000 lines of code {1000 * raises / code:.1f}")
    print(f"  lines of imports: {100 * imports / lines:.1f} %")
    print(f"  comments for 100 lines of code: {100 * comments / code:.1f}")
    print(f"  classes of ours below LightningModule: at most {depth} ({deepest})")


def print_tests() -> None:
    """Print the counts of tests/."""
    kinds = Counter[str]()
    functions = Counter[str]()
    matches = 0
    for path in TESTS:
        text = path.read_text()
        tree = ast.parse(text)
        found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        for node in found:
            source = ast.get_source_segment(text, node) or ""
            kind = "refusals" if "pytest.raises" in source or "refused" in node.name else "behaviour"
            kinds[kind] += spanned(node)
            functions[kind] += 1
            matches += source.count("match=")
        kinds["all"] += len(text.splitlines())
    rest = kinds["all"] - kinds["refusals"] - kinds["behaviour"]
    print(f"tests: {kinds['all']:,} lines in {len(TESTS)} files")
    for kind, count in functions.items():
        print(f"  {kind}: {count:,} functions, {kinds[kind]:,} lines")
    print(f"  fixtures, cases, helpers: {rest:,} lines; match= in test functions: {matches:,}")


def traced(function: Callable[..., Any], calls: Counter[str], *args: Any) -> Any:
    """Call a function, and set ``calls`` to the number of calls of each file of the package."""
    calls.clear()

    def note(frame: Any, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            calls[str(path.relative_to(PACKAGE))] += 1

    sys.setprofile(note)
    try:
        return function(*args)
    finally:
        sys.setprofile(None)


def print_steps() -> None:
    """Print the files and calls of training steps and rollouts."""
    from lightning.pytorch import Trainer

    from latentreward import alignment
    from latentreward.alignment import PolicySource, QuantileThreshold, RandomReward, Sampling
    from latentreward.core.registry import create_backbone
    from latentreward.reward import DiNaLRMModule
    from latentreward.tinyworld import TinyWorldDataModule, TinyWorldPromptDataModule

    options: dict[str, Any] = {"policy": PolicySource(), "reward": RandomReward("readout"), "guidance_scale": 1.0}
    methods: dict[str, Callable[[], Any]] = {
        "dina": lambda: DiNaLRMModule(create_backbone("sd35_tiny")),
        "lpo": lambda: alignment.LPOModule(**options, sampling=Sampling(4), selection=QuantileThreshold(0.0)),
        "grpo": lambda: alignment.TrajectoryGRPOModule(**options, sampling=Sampling(4), num_trajectories=4),
    }
    for name, make in methods.items():
        module = make()
        found = {method: Counter[str]() for method in ("training_step", "roll_out") if hasattr(module, method)}
        for method, calls in found.items():
            setattr(module, method, partial(traced, getattr(module, method), calls))
        with TemporaryDirectory() as folder:
            pairs = TinyWorldDataModule(folder, train_pairs=8, val_pairs=4, batch_size=4, num_workers=0)
            prompts = TinyWorldPromptDataModule(captions=8, batch_size=4, prompts_per_rollout=2)
            quiet = {"enable_progress_bar": False, "enable_model_summary": False}
            trainer = Trainer(max_steps=2, limit_val_batches=0, logger=False, enable_checkpointing=False, **quiet)
            trainer.fit(module, pairs if name == "dina" else prompts)
        for method, calls in found.items():
            print(f"{name}, {method}: {len(calls)} files, {calls.total()} calls")
            print(*(f"  {count:4} {file}" for file, count in calls.items()), sep="\n")


def print_score() -> None:
    """Print how many files of the package ``latentreward score`` executes for three pictures, libraries aside."""
    from PIL import Image

    from latentreward.core.registry import create_backbone
    from latentreward.reward import GatedQFormerHead, RewardModel

    code = (
        "import sys\nfrom latentreward.apps import cli\ncli.main(sys.argv[1:])\n"
        "names = [name for name in sys.modules if name.split('.')[0] == 'latentreward']\n"
        "print('latentreward score:', len(names), 'files; lightning is imported:', 'lightning' in sys.modules)\n"
    )
    with TemporaryDirectory() as folder:
        for shade in range(3):
            Image.new("RGB", (64, 64), (80 * shade, 9, 9)).save(f"{folder}/{shade}.png")
        backbone = create_backbone("sd35_tiny")
        head = GatedQFormerHead(backbone.feature_spec, num_heads=2)
        RewardModel(backbone, head).save_pretrained(f"{folder}/reward")
        command = ["score", "*.png", "scores.csv", "--model", "reward", "--prompt", "a red circle"]
        subprocess.run([sys.executable, "-c", code, *command], cwd=folder, check=True)


if __name__ == "__main__":
    print_sources()
    print_tests()
    if "steps" in sys.argv[1:]:
        print_steps()
        print_score()
