"""Files of a model for one runtime or another: each is written by that runtime's converter and checked beside eager.

ONNX Runtime, OpenVINO and TensorRT get the ONNX model of :mod:`.onnx_file`; PyTorch, AOTInductor, ExecuTorch, LiteRT
and Core ML get the program that torch.export captures. A file of the latter three takes one image at a time, as
runtimes of phones do.
"""
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .check import Check, Run, onnx_runner
from .constants import with_constants
from .facts import describe, facts, is_detector, weights_sha256
from .graph import explained, graphs, silent
from .onnx_file import OPSET, export_onnx, needed, onnx_model, values_of
from .report import ExportReport, megabytes, removed_if_wrong, report_on
from .source import MULTIPLE, Source, plain, source_of
from .tensorrt import TENSORRT, lacking

__all__ = ["FORMATS", "export_model"]

METADATA = "visionattn"  # what the metadata is called in files that hold more than ours


def export_model(
        model: nn.Module,
        out: str | Path,
        format: str = "onnx",
        image_size: tuple[int, int] | None = None,
        dynamic_size: bool = False,
        fuse: bool = False,
        **options: Any,
) -> ExportReport:
    """Writes ``model`` to the file ``out`` in one of ``FORMATS`` and checks it beside eager PyTorch.

    The check runs the file in its runtime, on photographs and random images, one and three at a time; the difference
    may be 1e-4 of the answers' scale, as :func:`visionattn.export.export_onnx` says. A Core ML package is loaded and
    its description compared, as Core ML runs on Apple's systems alone; a file for TensorRT is run in onnxruntime, and
    its operators are looked up in TensorRT's list.

    Args:
        model, image_size, dynamic_size, fuse: As :func:`visionattn.export.export_onnx` takes them.
        out: The file to write, or the folder of a Core ML package. It is removed again if the check fails.
        format: One of ``FORMATS``.
        options: ``opset``, ``preprocess``, ``simplify`` and ``fp16`` of :func:`visionattn.export.export_onnx`, for the
            formats that are made from the ONNX model.

    Raises:
        ModuleNotFoundError: A package that the format needs is missing.
        ValueError: There is no such format, the file's name has another ending, or the format cannot have this kind of
            model or an option.
        RuntimeError: The converter or the runtime cannot take the model, or their answers differ from eager's.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    kind, out = FORMATS[format], Path(out)
    if out.suffix != kind.suffix:
        raise ValueError(f"a file of format {format} ends in {kind.suffix}, {out.name} does not")
    if format == "onnx":
        return export_onnx(model, out, image_size, dynamic_size, fuse, **options)
    needed(kind.packages, f"format {format}", format)
    if kind.convert is None:
        return _captured(model, out, format, image_size, dynamic_size, fuse, options)
    proto, check = onnx_model(model, image_size, dynamic_size, fuse, **options)
    return kind.convert(proto, check, out)


class _Format(NamedTuple):
    """How files of a format are made."""

    suffix: str
    packages: list[str]
    convert: Any = None  # from an ONNX model
    write: Callable[[Source, str, Path], None] | None = None  # from a model and the metadata
    runner: Callable[[Path], Run] | None = None
    one_image: bool = False
    runtime: str = ""


def _captured(
        model: nn.Module, out: Path, format: str, image_size: tuple[int, int] | None, dynamic_size: bool, fuse: bool,
        options: dict[str, Any]) -> ExportReport:
    """Writes a file from the program that torch.export captures."""
    kind = FORMATS[format]
    wanted = [name for name, value in options.items() if value and (name, value) != ("opset", OPSET)]
    if wanted:
        raise ValueError(f"{wanted[0]} is for files that are made from the ONNX model, not for format {format}")
    if is_detector(model):
        raise ValueError(f"torch.export stops at sizes that depend on the number of objects, so format {format} has no "
                         "detectors: take onnx, openvino or tensorrt")
    if dynamic_size and kind.one_image:
        raise ValueError(f"a file of format {format} has one image size: leave dynamic_size out")
    sha256 = weights_sha256(model)
    source = source_of(plain(model, fuse), image_size, dynamic_size)
    found = facts(source.model, source.check.shapes[0]) | {"weights_sha256": sha256}
    assert kind.write is not None
    with removed_if_wrong(out):
        with explained(f"format {format} cannot have this model"), silent():
            kind.write(_of_one_image(source) if kind.one_image else source, json.dumps(found), out)
        return _report(source.check, out, kind, _values(source, describe(found)))


def _report(check: Check, out: Path, kind: "_Format", values: list[str], note: str = "") -> ExportReport:
    """Compares a file with eager and says how it did."""
    if kind.runner is None:
        return ExportReport(
            out, 0.0, None, megabytes(out), None, 0, None, values, check.tolerance, None, None, runtime="",
            note="not run: Core ML runs on Apple's systems alone; inputs and outputs were checked")
    open_file = kind.runner
    runner = (lambda path: _one_by_one(open_file(path))) if kind.one_image else open_file
    with silent():
        return report_on(out, check, runner, values, kind.runtime, note)


def _one_by_one(run: Run) -> Run:
    """A file of one image on batches."""
    def batch(images: np.ndarray) -> list[np.ndarray]:
        answers = [[np.array(x) for x in run(image[None])] for image in images]
        return [np.concatenate(rows) for rows in zip(*answers, strict=True)]

    return batch


def _values(source: Source, words: dict[str, str]) -> list[str]:
    """The inputs and outputs in words, a line each; lengths that are free have names."""
    sides = dict(zip((2, 3), zip(source.images.shape[2:], ("rows", "columns"), strict=True), strict=True))
    with torch.inference_mode():
        tensors = source.images, *source.check.answer(source.images)
    lines = []
    for name, x in zip(["images", *source.names], tensors, strict=True):
        shape = list(map(str, x.shape))
        for axis in source.free:
            if axis == 0:
                shape[0] = "batch"
            elif axis < x.ndim:
                side, free = sides[axis]
                shape[axis] = f"{x.shape[axis] * MULTIPLE // side}*{free}"
        lines.append(f"{name} [{', '.join(shape)}]: {words['map' if name.startswith('map_') else name]}")
    return lines


def _of_one_image(source: Source) -> Source:
    """The same for one image of one size, with constants for all that is computed of these alone."""
    source = source._replace(images=source.images[:1].contiguous(), free={})
    return source._replace(model=with_constants(_program(source)))


def _program(source: Source) -> Any:
    """What torch.export captures of the model."""
    return torch.export.export(
        source.model, (source.images,), dynamic_shapes=(source.free,) if source.free else None)


# What is made from the ONNX model


def _openvino(proto: Any, check: Check, out: Path) -> ExportReport:
    """An OpenVINO IR: the .xml file and its weights beside it, with the metadata as rt_info of the model."""
    import onnx
    import openvino

    with removed_if_wrong(out):
        with explained("OpenVINO cannot convert this model"), tempfile.TemporaryDirectory() as folder, silent():
            file = Path(folder, "model.onnx")
            onnx.save(proto, str(file))
            model = openvino.convert_model(file)
            for item in proto.metadata_props:
                model.set_rt_info(item.value, [METADATA, item.key])
            openvino.save_model(model, out, compress_to_fp16=False)
        return _report(check, out, FORMATS["openvino"], values_of(proto))


def _run_openvino(path: Path) -> Run:
    """The file on the CPU in float32; by default OpenVINO computes in bfloat16 where the CPU can."""
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {
        "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()})
    return lambda images: list(compiled(images).values())


def _tensorrt(proto: Any, check: Check, out: Path) -> ExportReport:
    """An ONNX file whose operators TensorRT has, by its list."""
    import onnx

    reasons = lacking(node for graph in graphs(proto.graph) for node in graph.node)
    if proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8:
        reasons.append("no Transpose of bytes (leave preprocess out)")
    if reasons:
        raise RuntimeError(f"TensorRT {TENSORRT} lacks what this model needs: {'; '.join(reasons)}")
    with removed_if_wrong(out):
        onnx.save(proto, str(out))
        return _report(
            check, out, FORMATS["tensorrt"], values_of(proto),
            f"no engine was built, which needs NVIDIA's GPU: trtexec --onnx={out.name} --saveEngine={out.stem}.engine")


# What is made from the captured program


def _write_torch(source: Source, found: str, out: Path) -> None:
    torch.export.save(_program(source), out, extra_files={f"{METADATA}.json": found})


def _run_torch(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda images: _arrays(module(torch.from_numpy(images)))


def _write_aoti(source: Source, found: str, out: Path) -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"AOTInductor compiles C++ and there is no {compiler}")
    torch._inductor.aoti_compile_and_package(
        _program(source), package_path=str(out), inductor_configs={"aot_inductor.metadata": {METADATA: found}})


def _run_aoti(path: Path) -> Run:
    package: Any = torch._inductor.aoti_load_package(str(path))
    return lambda images: _arrays(package(torch.from_numpy(images)))


def _write_executorch(source: Source, found: str, out: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    class Partitioner(XnnpackPartitioner):
        """Leaves tensors of more than XNNPACK's six axes to ExecuTorch's own operators."""

        def get_matched_nodes_from_configs(self, ep: Any) -> list[list[Any]]:
            return [nodes for nodes in super().get_matched_nodes_from_configs(ep) if all(map(_fits_xnnpack, nodes))]

    lowered = to_edge_transform_and_lower(
        _program(source), partitioner=[Partitioner()], constant_methods={"metadata": found}).to_executorch()
    out.write_bytes(lowered.buffer)


def _fits_xnnpack(node: Any) -> bool:
    """Whether a node and what it takes have at most six axes."""
    values = [item.meta.get("val") for item in (node, *node.all_input_nodes)]
    return all(value.ndim <= 6 for value in values if isinstance(value, Tensor))


def _run_executorch(path: Path) -> Run:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    return lambda images: [x.numpy().copy() for x in method.execute((torch.from_numpy(images),))]


def _write_litert(source: Source, found: str, out: Path) -> None:
    import litert_torch
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    litert_torch.convert(source.model, (source.images,)).export(str(out))
    model = flatbuffer_utils.read_model(str(out))
    buffer, entry = schema.BufferT(), schema.MetadataT()
    buffer.data, entry.name, entry.buffer = found.encode(), METADATA, len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or []), entry]
    flatbuffer_utils.write_model(model, str(out))


def _run_litert(path: Path) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=torch.get_num_threads())
    run = interpreter.get_signature_runner()
    taken, = run.get_input_details()
    names = sorted(run.get_output_details(), key=lambda name: int(name.rpartition("_")[2]))

    def answers(images: np.ndarray) -> list[np.ndarray]:
        found = run(**{taken: images})
        return [found[name] for name in names]

    return answers


def _write_coreml(source: Source, found: str, out: Path) -> None:
    import coremltools

    program = _program(source).run_decompositions({})
    aten = torch.ops.aten
    for node in list(program.graph.nodes):  # what coremltools does not know: nothing at all, and another name
        if node.target is aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
        elif node.target is aten.__and__.Tensor:
            node.target = aten.bitwise_and.Tensor
    model = coremltools.convert(
        program, inputs=[coremltools.TensorType(name="images", shape=source.images.shape)],
        outputs=[coremltools.TensorType(name=name) for name in source.names], convert_to="mlprogram",
        minimum_deployment_target=coremltools.target.iOS18, compute_precision=coremltools.precision.FLOAT32,
        skip_model_load=True)
    model.user_defined_metadata[METADATA] = found
    model.license = json.loads(found)["license"]
    model.save(str(out))
    description = coremltools.models.MLModel(str(out), skip_model_load=True).get_spec().description
    for values, names in ((description.input, ["images"]), (description.output, source.names)):
        if [value.name for value in values] != names:
            raise RuntimeError(f"the package has {', '.join(value.name for value in values)} for {', '.join(names)}")
    if list(description.input[0].type.multiArrayType.shape) != list(source.images.shape):
        raise RuntimeError("the package takes images of another shape")


def _arrays(answers: Any) -> list[np.ndarray]:
    """The outputs of a captured program as arrays."""
    return [x.detach().numpy() for x in (answers if isinstance(answers, (list, tuple)) else [answers])]


FORMATS: dict[str, _Format] = {
    "onnx": _Format(".onnx", [], runtime="onnxruntime"),
    "openvino": _Format(".xml", ["openvino"], _openvino, runner=_run_openvino, runtime="OpenVINO"),
    "torch": _Format(".pt2", [], write=_write_torch, runner=_run_torch, runtime="torch.export"),
    "aoti": _Format(".pt2", [], write=_write_aoti, runner=_run_aoti, runtime="AOTInductor"),
    "executorch": _Format(".pte", ["executorch"], write=_write_executorch, runner=_run_executorch, one_image=True,
                          runtime="ExecuTorch"),
    "litert": _Format(".tflite", ["litert_torch", "ai_edge_litert"], write=_write_litert, runner=_run_litert,
                      one_image=True, runtime="LiteRT"),
    "coreml": _Format(".mlpackage", ["coremltools"], write=_write_coreml, one_image=True),
    "tensorrt": _Format(".onnx", [], _tensorrt, runner=onnx_runner, runtime="onnxruntime"),
}
