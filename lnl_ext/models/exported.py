"""Programs of ``torch.export`` as models whose inner layers can be read."""

from __future__ import annotations

import difflib
import os
import zipfile
from typing import Any

import torch
from torch import Tensor, fx, nn

from lnl_ext.errors import UserError

__all__ = ["ExportedModel"]

_LAYERS = (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)
_DROPOUT = torch.ops.aten.dropout.default


class ExportedModel(nn.Module):
    """A program of `torch.export` with one input, images.

    Parameters
    ----------
    program
        Exported in evaluation mode: a program has one mode for good, and ``train`` and ``eval``
        do not change it.

    Attributes
    ----------
    batch_size, image_size : int or None
        What the program was exported for; None: any. A last batch that is smaller is filled up,
        and what comes of the filling is thrown away.

    Raises
    ------
    UserError
        The program does not take one batch of RGB images.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        names = program.graph_signature.user_inputs
        inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
        shapes = [tuple(n.meta["val"].shape) for n in inputs if hasattr(n.meta["val"], "shape")]
        if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] != 3:
            raise UserError(f"the program takes inputs of shapes {shapes}, expected (N, 3, H, W)")
        batch, _, height, width = shapes[0]
        self.batch_size = batch if isinstance(batch, int) else None
        self.image_size = height if isinstance(height, int) and height == width else None
        module = program.module()
        assert isinstance(module, fx.GraphModule)
        self.module = module

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExportedModel:
        """Read what ``torch.export.save`` wrote.

        Raises
        ------
        UserError
            It does not exist, or is not such a program.
        """
        if not os.path.isfile(path):
            raise UserError(f"no program at {os.fspath(path)}")
        if not zipfile.is_zipfile(path):  # torch would log a trace
            raise UserError(f"{os.fspath(path)} is not a torch.export program: not a ZIP archive")
        try:
            program = torch.export.load(path)
        except Exception as error:  # a damaged archive raises almost anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{os.fspath(path)} is not a torch.export program: {reason}") from error
        return cls(program)

    def train(self, mode: bool = True) -> ExportedModel:
        """Do nothing: the mode of a program is that of its export."""
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return what the program does for images (N, 3, H, W)."""
        count = len(images)
        if self.batch_size is not None and count < self.batch_size:
            filling = images[-1:].expand(self.batch_size - count, *images.shape[1:])
            images = torch.cat([images, filling])
        output: Tensor = self.module(images)
        return output[:count]

    def features(self, feature_layer: str | None = None) -> tuple[ExportedModel, str]:
        """Return the model up to a layer, and the layer's name.

        Parameters
        ----------
        feature_layer
            The path of a module in the exported model (``"layer4"``), or a node of the program's
            graph. By default the input of the last linear or convolutional layer, before dropout.

        Raises
        ------
        UserError
            There is no such layer; the message lists those there are.
        """
        node = self._last_layer() if feature_layer is None else self._find(feature_layer)
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for each in self.module.graph.nodes:
            if not (each.op == "call_module" and str(each.target).startswith("_guards")):
                copies[each] = graph.node_copy(each, lambda argument: copies[argument])
            if each is node:
                break
        graph.output(copies[node])
        front = ExportedModel.__new__(ExportedModel)
        nn.Module.__init__(front)
        front.batch_size, front.image_size = self.batch_size, self.image_size
        front.module = fx.GraphModule(self.module, graph)
        return front, feature_layer or node.name

    def _calls(self) -> list[fx.Node]:
        return [node for node in self.module.graph.nodes if node.op == "call_function"]

    def _last_layer(self) -> fx.Node:
        for node in reversed(self._calls()):
            if node.target in _LAYERS:
                source: Any = node.args[0]
                while source.target is _DROPOUT:
                    source = source.args[0]
                assert isinstance(source, fx.Node)
                return source
        raise UserError("the program has no linear or convolutional layer: name the feature layer")

    def _find(self, feature_layer: str) -> fx.Node:
        last: dict[str, fx.Node] = {}
        for node in self._calls():
            if not isinstance(node.meta.get("val"), Tensor):
                continue
            for path, _ in node.meta.get("nn_module_stack", {}).values():
                if path:
                    last[path] = node
            last[node.name] = node
        if feature_layer not in last:
            near = difflib.get_close_matches(feature_layer, last, n=3)
            nearest = f"Near it: {', '.join(near)}. " if near else ""
            raise UserError(
                f"feature layer {feature_layer!r}: no such layer. "
                f"{nearest}Possible: {', '.join(last)}"
            )
        return last[feature_layer]
