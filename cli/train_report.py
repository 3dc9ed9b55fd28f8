"""`curves.png` and `summary.html` of a run."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

from fastvit_cli.files import all_or_nothing
from fastvit_cli.train_view import COLUMNS, HEADINGS, cell

if TYPE_CHECKING:
    from fastvit_cli.train import Request

    from fastvit.run import Outcome

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ model }} on {{ data }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
img { width: 100%; height: auto; background: #fff; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .8rem; border-bottom: 1px solid #8884; }
tr.best { font-weight: 600; }
.scroll { overflow-x: auto; }
pre { overflow-x: auto; padding: 1rem; border: 1px solid #8884; }
</style></head><body>
<h1>{{ model }} on {{ data }}</h1>
<p>Best top-1 <strong>{{ "%.2f"|format(best.top1) }} %</strong>
(top-5 {{ "%.2f"|format(best.top5) }} %, loss {{ "%.4f"|format(best.val_loss) }})
in epoch {{ best.epoch }} of {{ history|length }}, on {{ best.images }} images of
validation.
{% if problems %}{{ problems|length }} images could not be read.{% endif %}</p>
<img src="data:image/png;base64,{{ curves }}"
  alt="Loss, accuracy and learning rate by epoch">
<h2>Epochs</h2><div class="scroll"><table>
<tr>{% for name in columns %}<th>{{ headings.get(name, name) }}</th>{% endfor %}</tr>
{% for row in history %}<tr{% if row.epoch == best.epoch %} class="best"{% endif %}>
{% for name in columns %}<td>{{ cell(name, row[name]) }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% if problems %}<h2>Images that could not be read</h2><ul>
{% for name, reason in problems|dictsort %}<li>{{ name }}: {{ reason }}</li>
{% endfor %}</ul>{% endif %}
<h2>Recipe</h2><pre>{{ recipe }}</pre>
</body></html>
"""


def write(request: Request, outcome: Outcome) -> None:
    """Both files, whole, into the run's folder."""
    import jinja2

    from fastvit.recipe_files import to_toml

    picture = curves(outcome.history, f"{request.model} on {request.data}")
    environment = jinja2.Environment(autoescape=True)
    page = environment.from_string(PAGE).render(
        model=request.model,
        data=request.data,
        best=outcome.best,
        history=outcome.history,
        problems=outcome.problems,
        curves=base64.b64encode(picture).decode(),
        columns=COLUMNS,
        headings=HEADINGS,
        cell=cell,
        recipe=to_toml(request.recipe),
    )
    targets = [request.output / "curves.png", request.output / "summary.html"]
    with all_or_nothing(targets) as (image, html):
        image.write_bytes(picture)
        html.write_text(page, encoding="utf-8")


def curves(history: list[dict[str, Any]], title: str) -> bytes:
    """Loss, accuracy and learning rate over epochs, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # Without pyplot: no global state, no display, no window.
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in history]
    lines = (
        (("train_loss", "train"), ("val_loss", "validation")),
        (("top1", "top-1"), ("top5", "top-5")),
        (("lr", "learning rate"),),
    )
    for axis, label, keys in zip(axes, ("loss", "per cent", "learning rate"), lines):
        for key, name in keys:
            values = [row[key] for row in history]
            axis.plot(epochs, values, marker=".", label=name)
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend(frameon=False)
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
