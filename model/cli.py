"""``medplib`` on the command line: one function a command. A user's error is one sentence and exit code 2."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model import __version__
from model.checkpoint.directories import default_model
from model.data.commands import add_data_command
from model.errors import MedPLIBError, escape_unprintable, shown
from model.eval.commands import add_compare_command, add_eval_command
from model.serve.commands import add_serve_command
from model.train.plan import add_plan_command
from model.train.runs import add_run_commands

ATTENTION = ("sdpa", "eager", "flash_attention_2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    escape_unprintable()
    options, unknown = build_parser().parse_known_args(arguments)
    if hasattr(options, "overrides"):  # argparse leaves those out that come after an option
        options.overrides += [word for word in unknown if not word.startswith("-")]
        unknown = [word for word in unknown if word.startswith("-")]
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    try:
        return options.run(options)
    except MedPLIBError as error:
        print(f"medplib: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output went away, as in `medplib … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UnicodeEncodeError as error:
        reason = "the locale's encoding lacks its characters; set PYTHONUTF8=1"
        print(f"medplib: {shown(error.object)} cannot be written or opened: {reason}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        where = f"{shown(error.filename, quoted=False)}: " if error.filename else ""
        print(f"medplib: {where}{error.strerror or error}; name a place that can be read and written", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="medplib",
        description="Ask a biomedical model about an image or a region of it, or for a mask. Research use only.",
    )
    parser.add_argument("--version", action="version", version=f"medplib {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is being done")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_ask(commands)
    _add_chat(commands)
    add_data_command(commands)
    _add_train(commands)
    _add_finetune(commands)
    add_plan_command(commands)
    add_run_commands(commands)
    add_eval_command(commands)
    add_compare_command(commands)
    add_serve_command(commands).set_defaults(run=run_serve)
    _add_export(commands)
    _add_describe(commands)
    _name_parsers(parser)
    return parser


def _name_parsers(parser: argparse.ArgumentParser) -> None:
    """Set in the options the parser of their command, whose usage an unknown flag shows."""
    parser.set_defaults(parser=parser)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _name_parsers(command)


def _add_ask(commands: argparse._SubParsersAction) -> None:
    ask = commands.add_parser("ask", help="ask one question about one image")
    ask.add_argument("image", type=Path, help="PNG, JPEG, TIFF or single-frame DICOM")
    ask.add_argument("question")
    _add_asking(ask)
    where = ask.add_mutually_exclusive_group()
    where.add_argument("--region", type=Path, metavar="MASK.png", help="the region the question is about")
    where.add_argument("--box", type=_numbers, metavar="X1,Y1,X2,Y2", help="the same as a box in image pixels")
    where.add_argument("--point", type=_numbers, metavar="X,Y", help="the same as a point in image pixels")
    ask.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    ask.set_defaults(run=run_ask)


def _add_chat(commands: argparse._SubParsersAction) -> None:
    chat = commands.add_parser("chat", help="talk about an image in the terminal, or pipe questions in")
    chat.add_argument(
        "image", type=Path, nargs="?", help="PNG, JPEG, TIFF or single-frame DICOM; words alone if absent"
    )
    _add_asking(chat)
    chat.add_argument(
        "--history",
        action=argparse.BooleanOptionalAction,
        help="send earlier questions along; by default where the checkpoint was trained on conversations",
    )
    where: dict[str, Any] = {"dest": "regions", "action": "append", "default": []}
    chat.add_argument(
        "--region", type=Path, metavar="MASK.png", help="a region of the first question; repeatable", **where
    )
    chat.add_argument("--box", type=_box, metavar="X1,Y1,X2,Y2", help="the same as a box in image pixels", **where)
    chat.add_argument("--point", type=_point, metavar="X,Y", help="the same as a point in image pixels", **where)
    chat.set_defaults(run=run_chat)


def _add_asking(command: argparse.ArgumentParser) -> None:
    """The model, how it answers, and where pictures go."""
    command.add_argument(
        "--model", type=Path, default=None, metavar="DIR", help="checkpoint; the shipped one when absent"
    )
    _add_parts(command)
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 …")
    command.add_argument(
        "--attention", choices=ATTENTION, default=ATTENTION[0], help="the last needs CUDA and flash-attn"
    )
    command.add_argument(
        "--quantisation", choices=("int8", "int4"), help="keep the language model's weights in fewer bits"
    )
    command.add_argument("--threshold", type=float, help="probability above which a pixel is in a mask")
    command.add_argument(
        "--no-mask-below",
        type=float,
        metavar="P",
        help="leave a mask empty that is there with less probability than P (0: keep all)",
    )
    command.add_argument("--max-new-tokens", type=int, default=256)
    command.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    command.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens up to P in sum"
    )
    command.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens; 0 keeps all"
    )
    command.add_argument("--seed", type=int, help="makes sampling repeatable")
    command.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end an answer before it; repeatable"
    )
    command.add_argument(
        "--out", type=Path, default=Path("medplib_out"), metavar="DIR", help="where pictures are written"
    )


def _add_train(commands: argparse._SubParsersAction) -> None:
    # No prefix makes an option here: every word, --help too, goes on to the training command.
    train = commands.add_parser("train", help="run one training stage from a recipe", add_help=False, prefix_chars="\0")
    train.add_argument("arguments", nargs=argparse.REMAINDER)
    train.set_defaults(run=run_train)


def _add_finetune(commands: argparse._SubParsersAction) -> None:
    tune = commands.add_parser(
        "finetune",
        help="fine-tune a model on own data without forgetting; ends with a before/after page",
        description="Fine-tune a model on own data. The run is an ordinary recipe (--print-recipe prints it); repeat "
        "the command with --resume after an interruption.",
    )
    tune.add_argument("data", type=Path, metavar="DATA", help="folder of medplib data build, record file, or source")
    tune.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values, e.g. optimizer.lr=1e-4")
    tune.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder")
    tune.add_argument("--model", type=Path, metavar="DIR", help="what is fine-tuned; the shipped model when absent")
    tune.add_argument("--method", choices=("auto", "full", "lora"), default="auto", help="what learns; auto says why")
    old = tune.add_mutually_exclusive_group()
    old.add_argument(
        "--rehearse", type=Path, metavar="DATA", help="what must not be forgotten; phantoms where the model knows them"
    )
    old.add_argument("--no-rehearse", action="store_true", help="train on own data alone")
    tune.add_argument("--share", type=float, default=0.6, metavar="S", help="own data's share beside rehearsal (0.6)")
    tune.add_argument("--terms", default="", metavar="TEXT", help="licence of the own data, for the model's card")
    tune.add_argument("--print-recipe", action="store_true", help="print the recipe for medplib train and stop")
    tune.add_argument("--resume", action="store_true", help="go on with the run in RUN")
    tune.set_defaults(run=run_finetune)


def _add_export(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser("export", help="write a checkpoint as a merged Hugging Face directory")
    export.add_argument("checkpoint", type=Path, help="a saved checkpoint, native or published, or a run folder")
    export.add_argument("out", type=Path)
    export.add_argument("--layout", choices=("native", "published", "adapter"), default="native")
    export.add_argument("--format", choices=("safetensors", "bin"), default="safetensors")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="as it is stored when absent")
    _add_parts(export)
    export.set_defaults(run=run_export)


def _add_describe(commands: argparse._SubParsersAction) -> None:
    describe = commands.add_parser("describe", help="say what a checkpoint directory holds")
    describe.add_argument("checkpoint", type=Path, help="native or published, or a finished run's folder")
    _add_parts(describe)
    describe.set_defaults(run=run_describe)


def _add_parts(command: argparse.ArgumentParser) -> None:
    """Where parts that a published checkpoint lacks come from; the published spellings are known too."""
    command.add_argument("--base", type=Path, metavar="DIR", help="of a LoRA, where its own base lies elsewhere")
    command.add_argument(
        "--vision-tower", "--vision_tower", type=Path, metavar="DIR", help="CLIP directory, for published checkpoints"
    )
    command.add_argument(
        "--sam",
        "--vision_pretrained",
        type=Path,
        metavar="FILE",
        help="SAM-Med2D file, for published checkpoints without SAM weights",
    )


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text!r:.80}") from None


def _box(text: str) -> tuple[str, tuple[float, ...]]:
    return "box", _numbers(text)


def _point(text: str) -> tuple[str, tuple[float, ...]]:
    return "point", _numbers(text)


def _generation(options: argparse.Namespace) -> Any:
    from model.inference.generation import GenerationSettings

    return GenerationSettings(
        options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.seed, tuple(options.stop)
    )


def run_ask(options: argparse.Namespace) -> int:
    """``medplib ask``."""
    from model.inference.predictor import Predictor
    from model.visualize import mask_line, write_pictures

    settings = _generation(options)
    region = options.region or (options.box and ("box", options.box)) or (options.point and ("point", options.point))
    predictor = Predictor.from_pretrained(
        options.model or default_model(),
        device=options.device,
        vision_tower=options.vision_tower,
        sam=options.sam,
        base=options.base,
        attention=options.attention,
        quantisation=options.quantisation,
    )
    start = time.perf_counter()
    image = predictor.set_image(options.image)
    encoding = time.perf_counter() - start
    answer = predictor.ask(
        image,
        options.question,
        region,
        options.threshold,
        settings=settings,
        no_mask_below=options.no_mask_below,
    )
    for part in ("encode", "total"):
        answer.timing[part] += encoding
    files = write_pictures(options.out, options.image.stem, image, answer, region)
    if options.json:
        print(json.dumps(answer.to_dict()))
        return 0
    print(answer.text)
    for mask in answer.masks:
        print(f"  {mask_line(mask)}")
    for note in answer.notes:
        print(f"  note: {note}")
    for file in files:
        print(f"  wrote {file}")
    return 0


def run_chat(options: argparse.Namespace) -> int:
    """``medplib chat``: exit 2 when questions came from a pipe and one could not be answered."""
    from model.inference.engine import Engine, EngineSettings, Request
    from model.serve.chat import ChatSettings, run_chat

    asked = Request(
        None, "-", settings=_generation(options), threshold=options.threshold, no_mask_below=options.no_mask_below
    )
    engine = Engine.from_pretrained(
        options.model or default_model(),
        EngineSettings(slots=1),
        device=options.device,
        vision_tower=options.vision_tower,
        sam=options.sam,
        base=options.base,
        attention=options.attention,
        quantisation=options.quantisation,
    )
    return run_chat(engine, options.image, ChatSettings(options.out, asked, options.history), options.regions)


def run_serve(options: argparse.Namespace) -> int:
    """``medplib serve``."""
    from model.serve.commands import run_serve as serve

    return serve(options, options.model or default_model())


def run_train(options: argparse.Namespace) -> int:
    """``medplib train``: the same as ``python -m model.train``."""
    from model.train.__main__ import main as train

    return train(options.arguments)


def run_finetune(options: argparse.Namespace) -> int:
    """``medplib finetune``."""
    from model.finetune import finetune

    options.model = options.model or default_model()
    return finetune(options)


def run_export(options: argparse.Namespace) -> int:
    """``medplib export``."""
    from model.checkpoint import export_published, save, save_adapter
    from model.checkpoint.directories import resolve
    from model.inference.presence import PRESENCE_FILE
    from model.train.checkpoint import unmerged_network

    if options.out.exists():
        raise MedPLIBError(f"{options.out} exists already; name a new directory")
    if options.layout != "published" and options.format == "bin":
        raise MedPLIBError(f"the {options.layout} layout is written as safetensors; use --layout published for .bin")
    if options.layout == "adapter" and options.dtype:
        raise MedPLIBError("an adapter keeps the type that it was trained in; leave --dtype out")
    if options.layout == "adapter":
        network, _, recipe = unmerged_network(options.checkpoint)
        if recipe.model.grounding:
            raise MedPLIBError(
                "the run made a mixture of two checkpoints, so no base fits an adapter; export it native"
            )
        save_adapter(network, options.out, recipe.model.base)
        print(f"wrote {options.out}")
        return 0
    model, processor = _open_for_export(options.checkpoint, options.vision_tower, options.sam, options.base)
    if options.dtype:
        import torch

        model.to(getattr(torch, options.dtype))
    if options.layout == "native":
        save(model, processor, options.out)
    else:
        export_published(model, processor, options.out, fmt=options.format)
    presence = resolve(options.checkpoint) / PRESENCE_FILE
    if presence.is_file():
        shutil.copyfile(presence, options.out / PRESENCE_FILE)
    print(f"wrote {options.out}")
    return 0


def _open_for_export(path: Path, vision_tower: Path | None, sam: Path | None, base: Path | None) -> tuple[Any, Any]:
    """The network and processor of a checkpoint, of a finished run, or of a run's newest training checkpoint."""
    from model.checkpoint import load
    from model.checkpoint.directories import resolve
    from model.train.checkpoint import network_of_run

    source = resolve(path)
    unmerged = (path / "recipe.yaml").is_file() or path.name.startswith("step_")
    if unmerged and not (source / "config.json").is_file():
        return network_of_run(path)
    return load(source, vision_tower=vision_tower, sam=sam, base=base)


def run_describe(options: argparse.Namespace) -> int:
    """``medplib describe``."""
    from model.checkpoint import describe

    print(describe(options.checkpoint, vision_tower=options.vision_tower, sam=options.sam, base=options.base))
    return 0


if __name__ == "__main__":
    sys.exit(main())
