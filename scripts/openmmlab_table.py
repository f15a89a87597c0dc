"""Published configurations of mm* packages on this package's operators, as the table of docs/openmmlab.md.

    python scripts/openmmlab_table.py --document                       # the table of the document, written there
    python scripts/openmmlab_table.py --quick --config 'mmdet/vfnet/*' # other configurations, without a Runner's epoch
    python scripts/openmmlab_table.py --dcn DCNv2 --config mmseg/fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512

Needs mmdet, mmseg or mmpretrain, mmcv-lite and torchvision; not a GPU, nor a network. Each configuration runs in a
process of its own, in a temporary folder, on generated pictures. The exit status is 1 if a stage of any of them fails.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from openmmlab import configurations
from openmmlab.stages import QUICK, STAGES, run

MMDET = """
    dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco dcn/mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco
    dcn/cascade-rcnn_r50-dconv-c3-c5_fpn_1x_coco dcn/cascade-mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco
    dcn/faster-rcnn_r50_fpn_dpool_1x_coco dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco
    dcnv2/faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco
    dcnv2/faster-rcnn_r50_fpn_mdpool_1x_coco retinanet/retinanet_r50_fpn_1x_coco dyhead/atss_r50_fpn_dyhead_1x_coco
    vfnet/vfnet_r50_fpn_1x_coco vfnet/vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco
    deformable_detr/deformable-detr_r50_16xb2-50e_coco centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco
    reppoints/reppoints-moment_r50_fpn_1x_coco guided_anchoring/ga-retinanet_r50-caffe_fpn_1x_coco
    tood/tood_r50_fpn_1x_coco foveabox/fovea_r50_fpn_gn-head-align_4xb4-2x_coco
    solov2/solov2-light_r50-dcn_fpn_ms-3x_coco detectors/cascade-rcnn_r50-sac_1x_coco
    fcos/fcos_r50-dcn-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco
    carafe/faster-rcnn_r50_fpn-carafe_1x_coco mask2former/mask2former_r50_8xb2-lsj-50e_coco
    dino/dino-4scale_r50_8xb2-12e_coco yolox/yolox_tiny_8xb8-300e_coco
"""
WITH_DCN = (
    "mmseg/deeplabv3/deeplabv3_r50-d8_4xb4-80k_ade20k-512x512",
    "mmseg/upernet/upernet_r50_4xb4-80k_ade20k-512x512",
    "mmseg/pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024",
)
OTHERS = ("mmpretrain/resnet/resnet50_8xb32_in1k",)
DOCUMENT = (
    *((f"mmdet/{name}", "") for name in MMDET.split()),
    *((name, dcn) for name in WITH_DCN for dcn in ("DCN", "DCNv2")),
    *((name, "") for name in OTHERS),
)
PAGE = Path(__file__).resolve().parents[1] / "docs" / "openmmlab.md"
DISTRIBUTIONS = (
    "torch", "torchvision", "mmcv-lite", "mmengine", "mmdet", "mmsegmentation", "mmpretrain", "numpy", "opencv-python",
)  # fmt: skip


def with_dcn(kind: str, config: Any) -> None:
    """What a user writes to make a backbone of mm* packages deformable."""
    config.model.backbone.update(
        dcn=dict(type=kind, deform_groups=1, fallback_on_stride=False), stage_with_dcn=(False, True, True, True)
    )


def one(pipe: Any, name: str, dcn: str, stages: tuple[str, ...]) -> None:
    """Run a configuration in this process, which ends with it."""
    package, _, file = name.removesuffix(".py").partition("/")
    done = run(package, f"{file}.py", stages, (lambda config: with_dcn(dcn, config)) if dcn else (lambda config: None))
    done["name"] = name.removesuffix(".py") + (f" dcn={dcn}" if dcn else "")
    pipe.send(done)


def in_a_process(name: str, dcn: str, stages: tuple[str, ...], seconds: float) -> dict[str, Any]:
    """What `one` says, or that it died or took too long."""
    context = multiprocessing.get_context("fork")  # the packages are imported once
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=one, args=(there, name, dcn, stages))
    process.start()
    there.close()
    try:
        if here.poll(seconds):
            return here.recv()
        error = f"took longer than {seconds:g} s"
    except EOFError:
        error = "the process died"
    finally:
        process.kill()
        process.join()
    return dict(name=name, cells={stages[0]: "fails"}, error=error, operators="", layers=0, seconds=seconds)


def row(done: dict[str, Any], stages: tuple[str, ...]) -> str:
    cells = [f"`{done['name']}`", str(done.get("layers", "")), *(done["cells"].get(stage, "") for stage in stages)]
    return f"| {' | '.join(cells)} |"


def versions() -> str:
    found = []
    for name in DISTRIBUTIONS:
        try:
            found.append(f"{name} {'.'.join(version(name).split('.')[:2])}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def into_document(lines: list[str]) -> None:
    """Replace what stands between the two marks."""
    first, last = "<!-- the table -->\n", "<!-- the end of the table -->"
    before, _, rest = PAGE.read_text().partition(first)
    _, _, after = rest.partition(last)
    PAGE.write_text(before + first + "\n".join(["", *lines, "", ""]) + last + after)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", metavar="GLOB", help="package/folder/file (default: the document's)")
    parser.add_argument(
        "--dcn", default="", choices=["", "DCN", "DCNv2"], help="give the backbones of --config this `dcn=`"
    )
    parser.add_argument("--quick", action="store_true", help=f"only: {', '.join(QUICK)}")
    parser.add_argument("--seconds", type=float, default=900, help="how long one may take (default: %(default)s)")
    parser.add_argument("--document", action="store_true", help="put the table into docs/openmmlab.md")
    parser.add_argument("--log", type=Path, help="append a line of JSON for each, with tracebacks")
    args = parser.parse_args()

    from dcn_plugin.integrations.mmcv import install

    print(install(), file=sys.stderr)
    if args.config:
        wanted = [(f"{p}/{n}", args.dcn) for pattern in args.config for p, n in configurations.find(pattern)]
    else:
        wanted = list(DOCUMENT)
    if not wanted:
        parser.error("--config: no configuration matches")
    for package in sorted({name.partition("/")[0] for name, _ in wanted}):
        __import__(f"{package}.models")
    stages = QUICK if args.quick else STAGES
    head = ["configuration", "deformable layers", *stages]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    print("\n".join(lines), flush=True)
    failed = 0
    for name, dcn in wanted:
        done = in_a_process(name, dcn, stages, args.seconds)
        failed += bool(done["error"])
        lines.append(row(done, stages))
        print(lines[-1], flush=True)
        if done["error"]:
            print(f"{done['name']}: {done['error'].splitlines()[0][:300]}", file=sys.stderr, flush=True)
        if args.log:
            with args.log.open("a") as log:
                print(json.dumps(done), file=log)
    command = f"python scripts/openmmlab_table.py {' '.join(sys.argv[1:])}".strip()
    lines += ["", f"`{command}`: {len(wanted) - failed} of {len(wanted)}; {versions()}."]
    print("\n".join(lines[-2:]))
    if args.document:
        into_document(lines)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
