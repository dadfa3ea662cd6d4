"""Small folders in the form in which public sets are published: file names, keys and oddities, with drawn pictures."""

from __future__ import annotations

import collections
import json
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np

SIZE = (20, 24)


def picture(path: Path, shade: int = 0, size: tuple[int, int] = SIZE) -> Path:
    """A grey gradient; another ``shade`` is another picture."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    return _save(path, ((rows * 5 + columns * 3 + shade * 17) % 256).astype(np.uint8))


def mask(path: Path, box: tuple[int, int, int, int] = (3, 4, 9, 12), size: tuple[int, int] = SIZE) -> Path:
    """A rectangle: rows and columns of its corners."""
    pixels = np.zeros(size, dtype=np.uint8)
    pixels[box[0] : box[2], box[1] : box[3]] = 255
    return _save(path, pixels)


def _save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)
    return path


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


# ---- MeCoVQA on SA-Med2D-20M ---------------------------------------------------------------------------------------

CT = "ct_00--AbdomenCT1K--Case_00220--x_0359"
MR = "mr_00--ACDC--patient001_frame01--z_0002"
XRAY = "x_ray--chest_x_ray--0001--2d_none"


def mecovqa(root: Path) -> tuple[Path, Path]:
    """MeCoVQA's folder and SAMed2D_v1, with every fault that the published files have.

    Grounding, by record: 0 merged from two instances; 1 without ``.png`` anywhere; 2 mask missing; 3 mask empty; 4 mask
    of another size; 5 image missing; 6 as record 0.
    """
    source, images = root / "MeCoVQA", root / "SAMed2D_v1"
    for shade, stem in enumerate((CT, MR, XRAY)):
        picture(images / "images" / f"{stem}.png", shade)
    mask(images / "masks" / f"{CT}--0003_000.png")
    mask(images / "masks" / f"{CT}--0003_001.png", (12, 14, 15, 18))
    mask(images / "masks" / f"{MR}--0001_000.png")
    mask(images / "masks" / f"{CT}--0005_000.png", (0, 0, 0, 0))
    mask(images / "masks" / f"{CT}--0006_000.png", size=(20, 30))

    def grounding(number: int, image: str, path: str) -> dict[str, Any]:
        talk = turns("<image>\nPlease segment the organ.", f"It is <SEG>.<mask>{path}</mask>")
        return {"id": f"g{number}", "image": image, "conversations": talk, "answer_type": "open"}

    listed = [
        (f"images/{CT}.png", f"masks_merged/{CT}--0003_merged.png"),
        (f"images/{MR}", f"masks_merged/{MR}--0001_merged"),
        (f"images/{CT}.png", f"masks_merged/{CT}--0009_merged.png"),
        (f"images/{CT}.png", f"masks_merged/{CT}--0005_merged.png"),
        (f"images/{CT}.png", f"masks_merged/{CT}--0006_merged.png"),
        ("images/ct_00--Nowhere--1--x_1.png", f"masks_merged/{CT}--0003_merged.png"),
        (f"images/{CT}.png", f"masks_merged/{CT}--0003_merged.png"),
    ]
    records = [grounding(number, *names) for number, names in enumerate(listed)]
    write_json(source / "train" / "MeCoVQA-Grounding.json", records)
    write_json(source / "zeroshot4grounding" / "mr.json", records[1:3])
    region = f"<image>\nWhat is in <region>masks_merged/{MR}--0001_merged</region>?"
    write_json(
        source / "train" / "MeCoVQA-Region.json",
        [{"id": "r0", "image": f"images/{MR}.png", "conversations": turns(region, "Heart"), "answer_type": "open"}],
    )
    write_json(
        source / "test" / "MeCoVQA_Complex_VQA_test.json",
        [
            {
                "id": 0,
                "image": f"images/{XRAY}.png",
                "conversations": turns("<image>\nIs it CT?", "No"),
                "answer_type": "closed",
            },
            {
                "id": 1,
                "image": f"images/{XRAY}.png",
                "conversations": turns("<image>\nFindings?", ""),
                "answer_type": "open",
            },
        ],
    )
    return source, images


# ---- VQA-RAD -------------------------------------------------------------------------------------------------------


def vqa_rad(root: Path) -> Path:
    for name in ("synpic54610.jpg", "synpic1.jpg"):
        picture(root / "VQA_RAD Image Folder" / name, len(name))
    common = {"image_organ": "HEAD", "qid_linked_id": "x", "evaluation": "not evaluated", "question_rephrase": "NULL"}

    def row(qid: int, answer: Any, answer_type: str, phrase: str, image: str = "synpic54610.jpg") -> dict[str, Any]:
        asked = {"qid": str(qid), "phrase_type": phrase, "image_name": image, "question": "Are regions infarcted? "}
        return {**common, **asked, "question_type": "PRES", "answer": answer, "answer_type": answer_type}

    rows = [
        row(1, "Yes", "CLOSED", "freeform"),
        row(2, "Right hemisphere\t", "OPEN", "para"),
        row(3, 4, "OPEN ", "freeform", "synpic1.jpg"),
        row(4, "No", "CLOSED ", "test_freeform", "synpic1.jpg"),
        row(5, "Left", "OPEN", "test_para"),
        row(6, "Yes", "CLOSED", "freeform", "synpic_gone.jpg"),
    ]
    write_json(root / "VQA_RAD Dataset Public.json", rows)
    return root


# ---- SLAKE ---------------------------------------------------------------------------------------------------------


def slake(root: Path) -> Path:
    for number in (1, 102):
        picture(root / "imgs" / f"xmlab{number}" / "source.jpg", number)

    def row(qid: int, lang: str, number: int = 1, **more: Any) -> dict[str, Any]:
        asked = {"img_id": number, "img_name": f"xmlab{number}/source.jpg", "q_lang": lang, "qid": qid}
        about = {"location": "Abdomen", "modality": "MRI", "base_type": "vqa", "triple": ["vhead", "_", "_"]}
        said = {
            "question": "What modality is used?",
            "answer": "MRI",
            "answer_type": "OPEN",
            "content_type": "Modality",
        }
        return {**asked, **about, **said, **more}

    closed = {"question": "Is it CT?", "answer": "Yes", "answer_type": "CLOSED", "modality": "CT"}
    chinese = {"question": "图像的成像方式是什么？", "answer": "核磁共振"}
    write_json(root / "train.json", [row(0, "en"), row(1, "zh", **chinese), row(2, "en", 102, **closed)])
    write_json(root / "validate.json", [row(3, "en")])
    write_json(root / "test.json", [row(4, "zh", **chinese), row(11934, "en", 102, modality="X-Ray")])
    return root


# ---- PathVQA -------------------------------------------------------------------------------------------------------


def path_vqa(root: Path) -> Path:
    """The original download: pickles and folders of images."""
    for split in ("train", "val", "test"):
        picture(root / "images" / split / f"{split}_0422.jpg", len(split))
        common = {"img_id": f"{split}_0422", "question_type": "where"}
        rows = [
            {**common, "answer_type": "other", "question_id": 100422000, "sent": "Where are stem cells located?"}
            | {"label": collections.OrderedDict({"in the canals of hering": 1})},
            {
                **common,
                "answer_type": "yes/no",
                "question_id": 100422001,
                "sent": "Are they bile cells?",
                "label": {"no": 1},
            },
        ]
        (root / "qas").mkdir(exist_ok=True)
        (root / "qas" / f"{split}_vqa.pkl").write_bytes(pickle.dumps(rows, protocol=2))
    return root


def path_vqa_parquet(root: Path, rows: int = 3) -> Path:
    """The cleaned copy on Hugging Face: images inside Parquet files."""
    import pyarrow
    import pyarrow.parquet

    (root / "data").mkdir(parents=True)
    content = picture(root / "one.jpg").read_bytes()
    (root / "one.jpg").unlink()
    for split in ("train", "validation", "test"):
        listed = [
            {
                "image": {"bytes": content, "path": None},
                "question": f"is it {number}?",
                "answer": ("yes", "bone")[number % 2],
            }
            for number in range(rows)
        ]
        place = root / "data" / f"{split}-00000-of-00001-abc.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(listed), place, row_group_size=2)
    return root


# ---- ImageCLEF VQA-Med ---------------------------------------------------------------------------------------------


def imageclef(root: Path) -> Path:
    """2019 whole, and of 2021 the validation and test files, whose answers lie beside the questions."""

    def lines(path: Path, *rows: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes("\r\n".join((*rows, "")).encode())

    first, second = root / "ImageClef-2019-VQA-Med-Training", root / "ImageClef-2019-VQA-Med-Validation"
    third, fourth = root / "VQAMed2019Test", root / "VQA-Med-2021-Tasks-1-2-NewValidationSets"
    fifth = root / "Task1-VQA-2021-TestSet-w-GroundTruth"
    picture(first / "Train_images" / "synpic41148.jpg", 1)
    picture(second / "Val_images" / "synpic54082.jpg", 2)
    picture(third / "VQAMed2019_Test_Images" / "synpic16333.jpg", 3)
    picture(fourth / "ImageCLEF-2021-VQA-Med-New-Validation-Images" / "synpic100.jpg", 4)
    picture(fifth / "images" / "VQA-500-Images" / "synpic200.jpg", 5)
    lines(
        first / "All_QA_Pairs_train.txt",
        "synpic41148|what kind of image is this?|cta - ct angiography",
        "synpic41148|is \tthis a t1 weighted image?|no",
        "synpic41148|which organs?|lung, mediastinum, pleura#spine and contents",
        "synpic41148|a line without an answer",
        "synpic_gone|is this a ct scan?|yes",
    )
    lines(
        first / "QAPairsByCategory" / "C1_Modality_train.txt",
        "synpic41148|what kind of image is this?|cta - ct angiography",
    )
    lines(first / "train_ImageIDs.txt", "synpic41148")
    lines(second / "All_QA_Pairs_val.txt", "synpic54082|is this an mri image?|yes")
    lines(third / "VQAMed2019_Test_Questions.txt", "synpic16333|what organ system is shown?")
    lines(
        third / "VQAMed2019_Test_Questions_w_Ref_Answers.txt",
        "synpic16333|organ|what organ system is shown?|skull and contents",
    )
    lines(
        fourth / "VQA-Med-2021-VQAnswering-Task1-New-ValidationSet.txt",
        "synpic100|what is abnormal?|zenker's diverticulum",
    )
    lines(fifth / "Task1-VQA-2021-TestSet-Questions.txt", "synpic200|is it abnormal?")
    lines(fifth / "Task1-VQA-2021-TestSet-ReferenceAnswers.txt", "synpic200|Yes")
    return root


# ---- PMC-VQA -------------------------------------------------------------------------------------------------------


def pmc_vqa(root: Path) -> Path:
    """Both versions: letters before the choices in the first, a column of row numbers in the second."""
    picture(root / "images" / "PMC1064097_F1.jpg", 1)
    picture(root / "figures" / "PMC8253797_Fig4_41.jpg", 2)
    (root / "train.csv").write_text(
        "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label\n"
        "PMC1064097_F1.jpg,What is the uptake pattern in the breast? , Focal uptake pattern, A:Diffuse uptake pattern ,"
        " B:Focal uptake pattern , C:No uptake pattern , D:Cannot determine,B\n"
        'PMC1064097_F1.jpg,"Which, ""if any"",\nlobe?",Left, A:Left , B:Right , C: , D: ,A\n'
        "PMC1064097_F1.jpg,No choice?,None, A:Left , B:Right , C:Up , D:Down ,E\n"
        "PMC1064097_F1.jpg,too few fields\n"
    )
    (root / "test_2.csv").write_text(
        ",Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split\n"
        "0,PMC8253797_Fig4_41.jpg,A slide.,What colour are the nuclei?, A:Blue , B:Pink , C:Brown , D:Purple ,A,test\n"
    )
    return root


# ---- OmniMedVQA ----------------------------------------------------------------------------------------------------


def omnimedvqa(root: Path) -> Path:
    """In a folder inside, as the archive unpacks."""
    inner = root / "OmniMedVQA"
    picture(inner / "Images" / "ACRIMA" / "Im553_g_ACRIMA.png", 1)
    row = {
        "dataset": "ACRIMA",
        "question_id": "ACRIMA_0000",
        "question_type": "Modality Recognition",
        "question": "What imaging technique was employed to obtain this picture?",
        "gt_answer": "Fundus imaging",
        "image_path": "Images/ACRIMA/Im553_g_ACRIMA.png",
        "option_A": "PET scan",
        "option_B": "CT scan",
        "option_C": "Blood test",
        "option_D": "Fundus imaging",
        "modality_type": "Fundus Photography",
    }
    two = {key: value for key, value in row.items() if key not in ("option_C", "option_D", "modality_type")}
    two |= {"question_id": "ACRIMA_0001", "question": "Is it normal?", "option_A": "Yes", "option_B": "No"}
    write_json(
        inner / "QA_information" / "Open-access" / "ACRIMA.json", [row, {**two, "gt_answer": "No", "modality": "X-Ray"}]
    )
    lost = {**row, "dataset": "Lost", "question_id": "Lost_0", "image_path": "Images/Lost/a.png"}
    write_json(inner / "QA_information" / "Restricted-access" / "Lost.json", [lost])
    return root


# ---- LLaVA-Med -----------------------------------------------------------------------------------------------------


def llava_med(root: Path, count: int = 4) -> tuple[Path, Path]:
    """The alignment file, whose odd images were never downloaded, and the folder of images."""
    domains = {"chest_xray": False, "mri": False, "histology": False, "gross": False, "ct_scan": False}
    asked = (
        "Provide a brief description of the given image.\n<image>",
        "<image>\nSummarize the visual content of the image.",
    )
    records = []
    for number in range(count):
        name = f"{25867105 + number}_F1"
        if number % 2 == 0:
            picture(root / "images" / f"{name}.jpg", number)
        talk = turns(asked[number % 2], f"Axial view, number {number}.")
        record = {"id": name, "image": f"{name}.jpg", "domain": {**domains, "ct_scan": number == 0}}
        records.append({**record, "conversatons": talk})
    return write_json(root / "llava_med_alignment_500k.json", records), root / "images"
