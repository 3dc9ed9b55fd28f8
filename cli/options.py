"""Options that commands share, and how their texts become values."""

from __future__ import annotations

import ast
import json
import os
import re
from typing import Annotated, Any

import typer
from fastvit_cli.builders import ModelOptions
from fastvit_cli.card import package_version
from fastvit_cli.errors import BadInput

DTYPES = ("float32", "float64", "float16", "bfloat16")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastvit {package_version()} (torch {package_version('torch')})")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version",
        callback=_show_version,
        is_eager=True,
        help="Show the version and exit.",
    ),
]
Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE|-",
        help="Write the result as JSON; - is the standard output.",
        rich_help_panel="Common",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="Print nothing but errors.", rich_help_panel="Common"
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Name everything, however many there are.",
        rich_help_panel="Common",
    ),
]
Debug = Annotated[
    bool,
    typer.Option(
        "--debug", help="Show a traceback on errors.", rich_help_panel="Common"
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Checkpoint to load: .safetensors, .pth, .pt, .pth.tar or .bin.",
        rich_help_panel="Model",
    ),
]
ModelArg = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="Argument of the model's factory, as num_classes=10; repeatable.",
        rich_help_panel="Model",
    ),
]
Pretrained = Annotated[
    bool,
    typer.Option(
        "--pretrained",
        help="Ask timm or torchvision for their weights.",
        rich_help_panel="Model",
    ),
]
InputSize = Annotated[
    str | None,
    typer.Option(
        metavar="CxHxW",
        help="Input of the model, without the batch (default: the model's own).",
        rich_help_panel="Model",
    ),
]
Seed = Annotated[
    int,
    typer.Option(help="Seed of random weights and inputs.", rich_help_panel="Model"),
]
Device = Annotated[
    str, typer.Option(help="Where to run: cpu, cuda, …", rich_help_panel="Model")
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(DTYPES)} (default: the model's own).",
        rich_help_panel="Model",
    ),
]


def refuse_empty(parameters: list[Any], values: dict[str, Any]) -> None:
    """See that no text that was given is empty: it would mean the folder one is in.

    Raises:
        BadInput: one is.
    """
    for parameter in parameters:
        value = values.get(parameter.name)
        texts = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(text, str) and not text.strip() for text in texts):
            is_option = parameter.param_type_name == "option"
            name = max(parameter.opts, key=len) if is_option else parameter.metavar
            raise BadInput(
                f"{name.strip('[]…')} is empty.",
                hint="Give it a value."
                if parameter.required
                else "Give it a value, or leave it out.",
            )


def parse_model(
    args: list[str] | None,
    *,
    input_size: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    **rest: Any,
) -> ModelOptions:
    """What the options of the panel `Model` say; `rest` needs no parsing.

    Raises:
        BadInput: one of the texts is not what its option takes.
    """
    if not 0 <= seed < 2**63:  # what torch's generators take
        raise BadInput(f"--seed {seed} is out of range.", hint="Use 0 to 2^63 - 1.")
    return ModelOptions(
        args=parse_model_args(args),
        input_size=parse_size(input_size),
        dtype=parse_choice("--dtype", dtype, DTYPES),
        seed=seed,
        **rest,
    )


def parse_choice(option: str, text: str | None, known: tuple[str, ...]) -> Any:
    """The text itself, if it is one of the known ones or was not given.

    Raises:
        BadInput: it is neither.
    """
    if text is not None and text not in known:
        raise BadInput(
            f"{option} {text} is not known.", hint=f"One of {', '.join(known)}."
        )
    return text


def parse_size(text: str | None) -> tuple[int, ...] | None:
    """`3x256x256` as numbers, any number of them; None where no size was given.

    Raises:
        BadInput: it does not have that form.
    """
    if text is None:
        return None
    found = re.fullmatch(r"\d+([x×]\d+)*", text.strip().lower())
    sizes = tuple(map(int, re.split("[x×]", found.group()))) if found else ()
    if not sizes or not all(sizes):
        raise BadInput(
            f"--input-size {text!r} is not a size.",
            hint="Give channels, height and width, as in 3x256x256; 1x16000 for sound.",
        )
    return sizes


def parse_model_args(texts: list[str] | None) -> dict[str, Any]:
    """`key=value` texts as keyword arguments; values are Python literals or words.

    Raises:
        BadInput: a text has another form, or a key comes twice.
    """
    args: dict[str, Any] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise BadInput(
                f"--model-arg {text!r} is not key=value.",
                hint="Write it as in --model-arg num_classes=10.",
            )
        if key in args:
            raise BadInput(f"--model-arg {key} is given twice.", hint="Give it once.")
        args[key] = _literal(text, value)
    return args


def _literal(text: str, value: str) -> Any:
    if re.fullmatch(r"[A-Za-z_][\w.:/-]*", value) and value not in KEYWORDS:
        return value  # a bare word is itself, as in act_layer=relu
    try:
        parsed = KEYWORDS[value] if value in KEYWORDS else ast.literal_eval(value)
        json.dumps(parsed)  # artefacts record it
        return parsed
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise BadInput(
            f"--model-arg {text!r}: {value!r} is not a Python literal.",
            hint="Numbers, words, True, None, [1, 2] and 'text in quotes' are.",
        ) from error


KEYWORDS = {"True": True, "False": False, "None": None, "true": True, "false": False}


def set_threads(wanted: int | None) -> int:
    """Threads of torch's own ops from here on; as they are where none are asked for.

    Raises:
        BadInput: the number is not positive.
    """
    import torch

    if wanted is None:
        return torch.get_num_threads()
    if wanted < 1:
        raise BadInput(f"--threads {wanted} is not positive.", hint="Use 1 or more.")
    most = os.cpu_count() or wanted
    if wanted > most:  # they would wait for one another, for hours
        message = f"--threads {wanted} is more than this machine's {most} processors."
        raise BadInput(message, hint=f"Use at most {most}.")
    torch.set_num_threads(wanted)
    return wanted
