"""The command line of ``vqa_infer``: the published flags (reference §9) and ours, each with something to do."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from model.errors import MedPLIBError
from model.eval.options import InferenceOptions

_EXAMPLE = """examples:
  python model/eval/vqa_infer.py --version assets/medplib-nano --val_data_path data/sample/held_out.json \\
      --image_folder data/sample --eval_seg --answers-file runs/nano.jsonl
  torchrun --nproc_per_node=4 model/eval/vqa_infer.py … the same, shared among four processes

A run that was stopped goes on when the same command is given again. Exit codes: 0 every question is answered,
2 something was wrong with what was asked for, 3 some questions could not be answered (see their rows)."""


def build_parser() -> argparse.ArgumentParser:
    """Every flag, grouped by what it is about."""
    parser = argparse.ArgumentParser(
        prog="vqa_infer",
        description="Answer every question of a data file with a MedPLIB checkpoint, one JSON line each. Research use.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_model(parser.add_argument_group("checkpoint"))
    _add_data(parser.add_argument_group("questions"))
    _add_what(parser.add_argument_group("what is written and reported"))
    _add_answering(parser.add_argument_group("how answers are drawn"))
    _add_machine(parser.add_argument_group("machine"))
    _add_in_context(parser.add_argument_group("in-context records (refused: questions are about one image)"))
    return parser


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--version", type=Path, required=True, metavar="DIR", help="checkpoint, native or published")
    group.add_argument("--vision_tower", type=Path, metavar="DIR", help="CLIP, for a published checkpoint")
    group.add_argument("--vision_pretrained", type=Path, metavar="FILE", help="SAM-Med2D, for a published checkpoint")
    group.add_argument("--moe_enable", action="store_true", help="refuse a checkpoint without a mixture of experts")
    group.add_argument(
        "--region_fea_adapter",
        action=argparse.BooleanOptionalAction,
        help="refuse a checkpoint without a region adapter; --no-… asks region questions without showing the region, "
        "as the published VQA loop does; regions are shown where neither is given",
    )
    group.add_argument("--sam_img_size", type=int, metavar="PIXELS", help="refuse a checkpoint with another SAM input")
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="as stored when absent, fp32 on a CPU")


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--val_data_path", type=Path, required=True, metavar="FILE", help="JSON, JSONL or Parquet")
    group.add_argument("--image_folder", type=Path, required=True, metavar="DIR", help="folder its paths start from")
    group.add_argument("--answer_type", metavar="WORD", help="label of every row; the record's own when absent")
    group.add_argument(
        "--turns",
        choices=("all", "first"),
        default="all",
        help="questions of a conversation that are asked, earlier ones shown with their reference answers (all)",
    )
    group.add_argument("--num-chunks", "--num_chunks", type=int, default=1, metavar="N", help="cut the records into N")
    group.add_argument("--chunk-idx", "--chunk_idx", type=int, default=0, metavar="I", help="and ask part I, from 0")
    group.add_argument("--limit", type=int, metavar="N", help="only the first N records")


def _add_what(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--answers-file",
        "--answers_file",
        type=Path,
        metavar="FILE",
        help="where the rows go (runs/infer/CHECKPOINT/DATA.jsonl)",
    )
    group.add_argument("--eval_vqa", action="store_true", help="print the published table of answer scores too")
    group.add_argument("--eval_seg", action="store_true", help="print mIoU and mDice too, overall and per modality")
    group.add_argument(
        "--thresholds",
        type=float,
        nargs="+",
        default=(),
        metavar="P",
        help="probabilities above which a pixel is in a mask; rows carry the masks at each, the first is that of "
        "“masks” (the checkpoint's own)",
    )
    group.add_argument(
        "--always_mask",
        action="store_true",
        help="paint a mask for each grounding question whether or not the answer says <SEG>, as the published "
        "--eval_seg did; without, such an answer scores 0",
    )
    group.add_argument("--no_mask_below", type=float, metavar="P", help="leave masks of a lower presence empty")
    group.add_argument("--vis_mask", action="store_true", help="write a picture of every row with masks")
    group.add_argument(
        "--vis_save_path", type=Path, metavar="DIR", help="where to (ANSWERS.pictures, beside the answers)"
    )
    group.add_argument("--return_gating_logit", action="store_true", help="write the share of tokens of each expert")
    group.add_argument("--overwrite", action="store_true", help="start anew where the answers file is there")


def _add_answering(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--conv_type", metavar="NAME", help="conversation template; v1 is the published evaluation's")
    group.add_argument("--model_max_length", type=int, metavar="TOKENS", help="of prompt, image and answer together")
    group.add_argument("--max_new_tokens", type=int, default=1024, metavar="TOKENS", help="of an answer (%(default)s)")
    group.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    group.add_argument("--top_p", type=float, metavar="P", help="nucleus, with a temperature above 0 (1)")
    group.add_argument("--num_beams", type=int, default=1, metavar="N", help="1: answers are not searched for")
    group.add_argument("--seed", type=int, default=42, help="of sampling (%(default)s)")


def _add_machine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda: each process its own, cuda:1 …")
    group.add_argument("--cpu_only", action="store_true", help="the same as --device cpu")
    group.add_argument("--batch_size", "--val_batch_size", type=int, default=8, metavar="N", help="asked together (8)")
    group.add_argument("--workers", type=int, default=2, metavar="N", help="threads that read ahead (%(default)s)")
    group.add_argument("--local_rank", "--local-rank", type=int, help="set by launchers")


def _add_in_context(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--icl_enable", action="store_true", help="read records with solved examples")
    group.add_argument("--icl_mask_mode", choices=("overlay", "separate"), help="how their masks are shown")


def parse_flags(arguments: Sequence[str] | None = None) -> tuple[InferenceOptions, int | None]:
    """The options of a command line, and the local rank a launcher has added.

    Raises:
        MedPLIBError: a flag cannot apply.
        SystemExit: a flag is unknown or malformed, as argparse does it.
    """
    flags = build_parser().parse_args(arguments)
    _refuse(flags)
    from model.checkpoint.directories import resolve

    answers = flags.answers_file or _default_answers(flags)
    beside = answers.with_name(f"{answers.stem}.pictures")
    options = InferenceOptions(
        model=resolve(flags.version),
        data=flags.val_data_path,
        images=flags.image_folder,
        answers=answers,
        vision_tower=flags.vision_tower and resolve(flags.vision_tower),
        sam=flags.vision_pretrained,
        answer_type=flags.answer_type,
        template=flags.conv_type,
        turns=flags.turns,
        max_new_tokens=flags.max_new_tokens,
        max_length=flags.model_max_length,
        temperature=flags.temperature,
        top_p=1.0 if flags.top_p is None else flags.top_p,
        seed=flags.seed,
        thresholds=tuple(flags.thresholds),
        always_mask=flags.always_mask,
        no_mask_below=flags.no_mask_below,
        regions=flags.region_fea_adapter,
        moe=flags.moe_enable,
        sam_size=flags.sam_img_size,
        router=flags.return_gating_logit,
        answer_scores=flags.eval_vqa,
        segmentation_scores=flags.eval_seg,
        pictures=(flags.vis_save_path or beside) if flags.vis_mask else None,
        precision=flags.precision,
        device="cpu" if flags.cpu_only else flags.device,
        batch_size=flags.batch_size,
        workers=flags.workers,
        num_chunks=flags.num_chunks,
        chunk_index=flags.chunk_idx,
        limit=flags.limit,
        overwrite=flags.overwrite,
    )
    return options, flags.local_rank


def _default_answers(flags: argparse.Namespace) -> Path:
    """Chunks are runs of their own, so each has its own file."""
    from model.eval.opening import run_folder

    part = f".chunk-{flags.chunk_idx}-of-{flags.num_chunks}" if flags.num_chunks > 1 else ""
    return run_folder("infer", flags.version) / f"{flags.val_data_path.stem}{part}.jsonl"


def _refuse(flags: argparse.Namespace) -> None:
    """What is published and cannot be done here."""
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
