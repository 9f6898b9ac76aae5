"""Web page to try a reward model by hand (extra ``ui``): scores images for a prompt at several noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latentreward.apps.serving.batch_scorer import standing
from latentreward.errors import InputError
from latentreward.scoring import RewardModel, edit_prompt

if TYPE_CHECKING:
    import gradio
    from matplotlib.figure import Figure

TITLE = "Score images with a latent reward"
LEVELS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # noise levels in [0, 1] at which the plot shows scores
COLUMNS = ("image", "score", "z-score", "quantile")
MOST_IMAGES = 32
STYLE = """
.table-wrap:focus-visible { outline: 2px solid; outline-offset: -2px }
button.primary { background: #c2410c !important; color: #ffffff !important; transition: none !important }
.or { color: var(--body-text-color) !important; opacity: 1 !important }
"""
"""Style that shows where the focus is, which Gradio's tables hide, and gives faint texts a contrast of 4.5."""


def score_sheet(
    reward: RewardModel, prompt: str, images: Sequence[str | Path], sources: Sequence[str | Path] = ()
) -> tuple[list[list[Any]], Figure]:
    """Score images for one prompt, and return a table and a plot of the scores by noise level.

    The images are edits of the pictures ``sources``. The rows have the columns :data:`COLUMNS`, best first; z-scores
    and quantiles are None without a calibration.

    Raises:
        InputError: If there is no image, there are too many images, or an image cannot be read.
    """
    from matplotlib.figure import Figure

    if not 0 < len(images) <= MOST_IMAGES:
        raise InputError(f"there are {len(images)} images; give 1 to {MOST_IMAGES}")
    levels = [replace(reward.noise, sigmas=(sigma,), timesteps=()) for sigma in LEVELS]
    prompt = edit_prompt(prompt, [Path(source) for source in sources]) if sources else prompt
    with torch.inference_mode():
        scores = reward.score_levels(prompt, [Path(image) for image in images], [reward.noise, *levels])
    names, own = [Path(image).name for image in images], scores[:, 0]
    blank: list[float | None] = [None] * len(names)
    columns = (own.tolist(), *(standing(reward, own) or (blank, blank)))
    rounded = [[None if value is None else round(value, 4) for value in column] for column in columns]
    rows = [list(cells) for cells in zip(names, *rounded, strict=True)]
    order = own.argsort(descending=True, stable=True).tolist()
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, line in zip(names, scores[:, 1:].tolist(), strict=True):
        axes.plot(LEVELS, line, marker="o", markersize=3, label=name[-30:].replace("$", r"\$"))
    for sigma in reward.noise.sigmas:
        axes.axvline(sigma, color="grey", linewidth=0.8, linestyle=":")
    axes.set(title="Score by noise level", xlabel="noise level σ", ylabel="score")
    if len(names) <= 8:
        axes.legend(frameon=False, fontsize="small")
    return [rows[index] for index in order], figure


def build_page(reward: RewardModel) -> gradio.Blocks:
    """Build the page; it loads nothing from other hosts, and Gradio's usage reports are off."""
    import gradio as gr

    def score(
        prompt: str,
        images: Sequence[tuple[str, str | None]] | None,
        sources: Sequence[tuple[str, str | None]] | None = None,
    ) -> tuple[list[list[Any]], Figure]:
        try:
            return score_sheet(
                reward, prompt or "", *([path for path, _ in given or []] for given in (images, sources))
            )
        except InputError as error:
            raise gr.Error(str(error), print_exception=False) from error

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}")
        gr.Textbox(reward.identity, label="Reward model", interactive=False, lines=1)
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(label="Prompt")
                files = {"type": "filepath", "file_types": ["image"], "columns": 4, "height": 320}
                edits = reward.backbone.sources != (0, 0)
                sources = [gr.Gallery(label="Pictures that were edited", **files)] if edits else []
                images = gr.Gallery(label="Images", **files)
                button = gr.Button("Score", variant="primary")
            with gr.Column():
                sheet = gr.Dataframe(headers=list(COLUMNS), label="Scores", interactive=False)
                plot = gr.Plot(show_label=False)
        button.click(score, [prompt, images, *sources], [sheet, plot], api_name=False)
    return page


def launch(reward: RewardModel, port: int) -> None:
    """Serve the page at 127.0.0.1 until Ctrl-C."""
    page = build_page(reward)
    where = {"server_name": "127.0.0.1", "server_port": port, "share": False, "ssr_mode": False}
    page.launch(**where, footer_links=[], max_file_size="64mb", quiet=True, prevent_thread_lock=True, css=STYLE)
    print(f"page for {reward.identity} at http://127.0.0.1:{port}", flush=True)
    page.block_thread()
