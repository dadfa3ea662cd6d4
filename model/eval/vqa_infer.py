"""``python model/eval/vqa_infer.py …``: answer every question of a data file, on one device or many.

Runs by its path or as ``python -m model.eval.vqa_infer``, alone or under ``torchrun``, ``accelerate launch`` and
``deepspeed``; see ``--help``.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

if __package__ in (None, ""):  # run by its path: the package is not where Python looks, and this folder need not be
    sys.path[:] = [str(Path(__file__).resolve().parents[2]), *(p for p in sys.path if p != str(Path(__file__).parent))]

from model.errors import MedPLIBError, escape_unprintable, shown
from model.eval.options import FAILED_QUESTIONS, InferenceOptions

_EXAMPLE = """examples:
  python model/eval/vqa_infer.py --version assets/medplib-nano --val_data_path data/sample/held_out.json \\
      --image_folder data/sample --eval_seg --answers-file runs/nano.jsonl
  torchrun --nproc_per_node=4 model/eval/vqa_infer.py … the same, shared among four processes

A run that was stopped goes on when the same command is given again. Exit codes: 0 every question is answered,
2 something was wrong with what was asked for, 3 some questions could not be answered (see their rows)."""


def build_parser() -> argparse.ArgumentParser:
    """Every flag, published (reference §9) or ours, grouped by what it is about."""
    parser = argparse.ArgumentParser(
        prog="vqa_infer",
        description="Answer every question of a data file with a MedPLIB checkpoint, one JSON line each. Research use.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("checkpoint").add_argument
    add("--version", dest="model", type=Path, required=True, metavar="DIR", help="checkpoint, native or published")
    add("--vision_tower", type=Path, metavar="DIR", help="CLIP, for a published checkpoint")
    add("--vision_pretrained", dest="sam", type=Path, metavar="FILE", help="SAM-Med2D, for a published checkpoint")
    add("--moe_enable", dest="moe", action="store_true", help="refuse a checkpoint without a mixture of experts")
    add(
        "--region_fea_adapter",
        dest="regions",
        action=argparse.BooleanOptionalAction,
        help="refuse a checkpoint without a region adapter; --no-… asks region questions without showing the region, "
        "as the published VQA loop does; regions are shown where neither is given",
    )
    add("--sam_img_size", dest="sam_size", type=int, metavar="PIXELS", help="refuse another SAM input")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="as stored when absent, fp32 on a CPU")
    add = parser.add_argument_group("questions").add_argument
    add("--val_data_path", dest="data", type=Path, required=True, metavar="FILE", help="JSON, JSONL or Parquet")
    add("--image_folder", dest="images", type=Path, required=True, metavar="DIR", help="folder its paths start from")
    add("--answer_type", metavar="WORD", help="label of every row; the record's own when absent")
    add(
        "--turns",
        choices=("all", "first"),
        default="all",
        help="questions of a conversation that are asked, earlier ones shown with their reference answers (all)",
    )
    add("--num-chunks", "--num_chunks", type=int, default=1, metavar="N", help="cut the records into N")
    add("--chunk-idx", "--chunk_idx", dest="chunk_index", type=int, default=0, metavar="I", help="ask part I, from 0")
    add("--limit", type=int, metavar="N", help="only the first N records")
    add = parser.add_argument_group("what is written and reported").add_argument
    add(
        "--answers-file",
        "--answers_file",
        dest="answers",
        type=Path,
        metavar="FILE",
        help="default: runs/infer/CHECKPOINT/DATA.jsonl",
    )
    add("--eval_vqa", dest="answer_scores", action="store_true", help="print the published table of answer scores too")
    add("--eval_seg", dest="segmentation_scores", action="store_true", help="print mIoU and mDice too")
    add(
        "--thresholds",
        type=float,
        nargs="+",
        default=(),
        metavar="P",
        help="probabilities above which a pixel is in a mask; rows carry the masks at each, the first is that of "
        "“masks” (the checkpoint's own)",
    )
    add(
        "--always_mask",
        action="store_true",
        help="decode a mask for each grounding question whether or not the answer says <SEG>, as the published "
        "--eval_seg did; without, such an answer scores 0",
    )
    add("--no_mask_below", type=float, metavar="P", help="leave masks of a lower presence empty")
    add("--vis_mask", action="store_true", help="write a picture of every row with masks")
    add("--vis_save_path", type=Path, metavar="DIR", help="where to (ANSWERS.pictures, beside the answers)")
    add("--return_gating_logit", dest="router", action="store_true", help="write the share of tokens of each expert")
    add("--overwrite", action="store_true", help="start anew where the answers file is there")
    add = parser.add_argument_group("how answers are drawn").add_argument
    add("--conv_type", dest="template", metavar="NAME", help="conversation template; v1 is the published evaluation's")
    add("--model_max_length", dest="max_length", type=int, metavar="TOKENS", help="of prompt, image and answer")
    add("--max_new_tokens", type=int, default=1024, metavar="TOKENS", help="of an answer (%(default)s)")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--top_p", type=float, metavar="P", help="nucleus, with a temperature above 0 (1)")
    add("--num_beams", type=int, default=1, metavar="N", help="1: answers are not searched for")
    add("--seed", type=int, default=42, help="of sampling (%(default)s)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto (default), cpu, cuda: each process its own, cuda:1 …")
    add("--cpu_only", action="store_true", help="the same as --device cpu")
    add("--batch_size", "--val_batch_size", type=int, default=8, metavar="N", help="asked together (8)")
    add("--workers", type=int, default=2, metavar="N", help="threads that read ahead (%(default)s)")
    add("--local_rank", "--local-rank", type=int, help="set by launchers")
    add = parser.add_argument_group("in-context records (refused: questions are about one image)").add_argument
    add("--icl_enable", action="store_true", help="read records with solved examples")
    add("--icl_mask_mode", choices=("overlay", "separate"), help="how their masks are shown")
    return parser


def parse_flags(arguments: Sequence[str] | None = None) -> tuple[InferenceOptions, int | None]:
    """The options of a command line, and the local rank a launcher has added.

    Raises:
        MedPLIBError: a flag cannot apply.
        SystemExit: a flag is unknown or malformed, as argparse does it.
    """
    flags = build_parser().parse_args(arguments)
    if flags.num_beams != 1:
        raise MedPLIBError(f"--num_beams is {flags.num_beams}, but answers are decoded without a beam search; give 1")
    if flags.icl_enable or flags.icl_mask_mode:
        raise MedPLIBError(
            "--icl_enable and --icl_mask_mode are for in-context records, which show solved examples as further images "
            "while questions are asked about one here; leave the flags out and give records without examples"
        )
    if flags.precision == "fp16":
        raise MedPLIBError("--precision fp16 is not offered, only fp32 and bf16 are tested; give one of them")
    if flags.vis_save_path and not flags.vis_mask:
        raise MedPLIBError("--vis_save_path names a folder for pictures; give --vis_mask too")
    if flags.cpu_only and flags.device not in ("auto", "cpu"):
        raise MedPLIBError(f"--cpu_only and --device {flags.device} contradict each other; give one of them")
    from model.checkpoint.directories import resolve

    # chunks are runs of their own, so each has its own file
    part = f".chunk-{flags.chunk_index}-of-{flags.num_chunks}" if flags.num_chunks > 1 else ""
    if flags.answers is None:
        from model.eval.shards import run_folder

        flags.answers = run_folder("infer", flags.model) / f"{flags.data.stem}{part}.jsonl"
    beside = flags.answers.with_name(f"{flags.answers.stem}.pictures")
    flags.pictures = (flags.vis_save_path or beside) if flags.vis_mask else None
    flags.model, flags.vision_tower = resolve(flags.model), flags.vision_tower and resolve(flags.vision_tower)
    flags.top_p = 1.0 if flags.top_p is None else flags.top_p
    flags.thresholds = tuple(flags.thresholds)
    flags.device = "cpu" if flags.cpu_only else flags.device
    options = InferenceOptions(**{item.name: getattr(flags, item.name) for item in fields(InferenceOptions)})
    return options, flags.local_rank


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    escape_unprintable()
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    who = f"vqa_infer (process {os.environ.get('RANK')})" if several else "vqa_infer"
    try:
        options, local_rank = parse_flags(arguments)  # before anything that takes long to import

        from model.eval.run import run_inference, summary_lines
        from model.eval.shards import Rank

        rank = Rank.from_environment(local_rank)
        logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
        logging.getLogger("model.eval").setLevel(logging.WARNING if rank.rank else logging.INFO)
        outcome = run_inference(options, rank)
        if rank.rank:  # the first one reports; a launcher would end the others at the sight of a failure
            return 0
        sys.stdout.writelines(f"{line}\n" for line in summary_lines(outcome, options))
        return FAILED_QUESTIONS if outcome.errors else 0
    except MedPLIBError as error:
        sys.stderr.write(f"{who}: {error}\n")
        return 2
    except OSError as error:  # a disk that filled up on the way
        where = f"{shown(error.filename, quoted=False)}: " if error.filename else ""
        sys.stderr.write(f"{who}: {where}{error.strerror or error}; mend that and go on\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("vqa_infer: stopped; run the same command again to go on\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
