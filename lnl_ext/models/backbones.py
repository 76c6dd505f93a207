"""Classification networks cut at a named layer into a backbone f and a classifier g.

Both share the parameters of the network they were cut from, under the same names, so that
training them trains it: its ``state_dict`` is what to save.
"""

from __future__ import annotations

import difflib
import inspect
import math
import operator
import re
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import DualGraphModule, NodePathTracer

from lnl_ext.errors import UserError
from lnl_ext.models.efficientnet import EFFICIENTNET_LITE0, efficientnet_lite0
from lnl_ext.models.small import small_network

__all__ = [
    "SMALL",
    "BackboneAndClassifier",
    "build_network",
    "default_feature_layer",
    "output_layer",
    "split_network",
]

SMALL = "small"
"""The architecture that is not torchvision's: `lnl_ext.models.small`."""

_OPERATIONS = [
    member
    for _, member in inspect.getmembers(torchvision.ops, inspect.isclass)
    if issubclass(member, nn.Module)
]


def build_network(arch: str, classes: int) -> nn.Module:
    """Make a classification network with new weights.

    Parameters
    ----------
    arch
        A name of ``torchvision.models.list_models(module=torchvision.models)``; or ``"small"``:
        `lnl_ext.models.small.small_network`; or ``"efficientnet_lite0"``:
        `lnl_ext.models.efficientnet.efficientnet_lite0`.
    classes
        Number of label classes.

    Raises
    ------
    UserError
        If there is no such architecture; the message lists those that are similar.
    """
    if arch == SMALL:
        return small_network(classes)
    if arch == EFFICIENTNET_LITE0:
        return efficientnet_lite0(classes)
    names = torchvision.models.list_models(module=torchvision.models)
    if arch not in names:
        near = difflib.get_close_matches(arch, names, n=5, cutoff=0.3) or names
        raise UserError(
            f"arch is {arch!r}, expected {SMALL}, {EFFICIENTNET_LITE0} or a classification model "
            f"of torchvision, such as {', '.join(near)}"
        )
    # Both draw their weights anew in any case; saying so keeps torchvision's warning away.
    options = {"init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    network: nn.Module = torchvision.models.get_model(arch, num_classes=classes, **options)
    return network


class BackboneAndClassifier(NamedTuple):
    """A network cut in two: ``classifier(features(images))`` is the network's prediction."""

    features: nn.Module
    """The backbone f: images (N, 3, H, W) to features."""
    classifier: nn.Module
    """The classifier g: features to label logits (N, C)."""
    feature_layer: str
    """The layer at whose output the cut is."""


class _Traced:
    """The graph of a network in one mode, with the names of its nodes."""

    def __init__(self, network: nn.Module, *, training: bool) -> None:
        was_training = network.training
        # Auxiliary classifiers (GoogLeNet, Inception) would make the output a tuple.
        auxiliary = getattr(network, "aux_logits", None)
        try:
            if auxiliary is not None:
                network.aux_logits = False  # type: ignore[assignment]
            network.train(training)
            tracer = NodePathTracer(
                leaf_modules=_OPERATIONS, autowrap_modules=(math, torchvision.ops)
            )
            self.graph: fx.Graph = tracer.trace(network)
        finally:
            if auxiliary is not None:
                network.aux_logits = auxiliary
            network.train(was_training)
        self.network = network
        (self.input,) = (node for node in self.graph.nodes if node.op == "placeholder")
        (self.output,) = (node for node in self.graph.nodes if node.op == "output")
        alive = _needed(self.output)
        self.nodes: list[fx.Node] = [node for node in self.graph.nodes if node in alive]
        self.names: dict[fx.Node, str] = {
            n: name for n, name in tracer.node_to_qualname.items() if n in alive
        }

    def cuts(self) -> list[fx.Node]:
        """Return the nodes through which everything from the input to the output goes."""
        depends = {self.input}
        for node in self.nodes:
            if any(argument in depends for argument in node.all_input_nodes):
                depends.add(node)
        order = [node for node in self.nodes if node in depends]
        position = {node: at for at, node in enumerate(order)}
        found, reach = [], 0
        for at, node in enumerate(order):
            # No value made before this node is used after it.
            if reach <= at and node not in (self.input, self.output):
                found.append(node)
            reach = max([reach, *(position[user] for user in node.users if user in position)])
        return found

    def output_layer(self) -> fx.Node:
        """Return the last linear or convolutional layer: the one that makes the logits."""
        node: fx.Node
        for node in reversed(self.nodes):
            if node.op == "call_module" and isinstance(
                self.network.get_submodule(str(node.target)), (nn.Linear, nn.Conv2d)
            ):
                return node
        raise UserError("the network has no linear or convolutional layer: name the feature layer")

    def default_feature_layer(self) -> fx.Node:
        """Return what goes into the output layer, before dropout."""
        node: fx.Node = self.output_layer().all_input_nodes[0]
        while node.op == "call_module" and isinstance(
            self.network.get_submodule(str(node.target)), nn.Dropout
        ):
            node = node.all_input_nodes[0]
        return node

    def find(self, feature_layer: str) -> fx.Node:
        """Return the last node of the layer of this name."""
        nodes = [
            n
            for n, name in self.names.items()
            if name == feature_layer or name.startswith(f"{feature_layer}.")
        ]
        cuts = self.cuts()
        if nodes and nodes[-1] in cuts:
            return nodes[-1]
        why = "something goes past it (a skip connection, say)" if nodes else "no such layer"
        raise UserError(
            f"feature layer {feature_layer!r}: {why}. {_choices(feature_layer, self._layers(cuts))}"
        )

    def _layers(self, cuts: list[fx.Node]) -> list[str]:
        """Return every name that `find` takes: nodes, and the modules that end in one."""
        names = list(self.names.values())
        last = {}
        for name in names:
            parts = name.split(".")
            for depth in range(1, len(parts) + 1):
                last[".".join(parts[:depth])] = name
        good = {self.names[node] for node in cuts}
        return [layer for layer, name in last.items() if name in good]

    def layers(self) -> list[str]:
        """Return the names that can be the feature layer, in the order of the network."""
        return self._layers(self.cuts())

    def parts(self, cut: fx.Node) -> tuple[fx.Graph, fx.Graph]:
        """Return the graphs up to ``cut`` and from there."""
        front = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        self._copy(_needed(cut), front, copies)
        front.output(copies[cut])
        back = fx.Graph()
        entry = back.placeholder("features")
        if any(self._in_place(user, cut) for user in cut.users):
            # A bias head reads these features as well: they must not change.
            entry = back.call_method("clone", (entry,))
        self._copy(_needed(self.output, beyond=cut), back, {cut: entry})
        return front, back

    def _copy(self, nodes: set[fx.Node], graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> None:
        for node in self.nodes:
            if node in nodes:
                copies[node] = graph.node_copy(node, lambda argument: copies[argument])

    def _in_place(self, user: fx.Node, node: fx.Node) -> bool:
        if user.op == "call_module":
            return bool(getattr(self.network.get_submodule(str(user.target)), "inplace", False))
        name = user.target if isinstance(user.target, str) else ""
        first = bool(user.args) and user.args[0] is node
        changes = user.target is operator.iadd or re.fullmatch(r".*[^_]_", name) is not None
        return bool(user.kwargs.get("inplace", False)) or (first and changes)


def _needed(end: fx.Node, beyond: fx.Node | None = None) -> set[fx.Node]:
    """Return ``end`` and what it is computed from, as far as that comes after ``beyond``."""
    needed: set[fx.Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node is not beyond and node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    return needed


def _choices(wrong: str, layers: list[str]) -> str:
    near = difflib.get_close_matches(wrong, layers, n=3)
    nearest = f"Near it: {', '.join(near)}. " if near else ""
    return f"{nearest}Possible: {', '.join(layers)}"


def split_network(network: nn.Module, feature_layer: str | None = None) -> BackboneAndClassifier:
    """Cut ``network`` at a layer.

    Parameters
    ----------
    network
        A module that `torch.fx` can trace, as all classification models of torchvision are. It
        keeps its parameters; both parts use the same ones.
    feature_layer
        The name of a layer (``"layer3"``, ``"avgpool"``, ``"layer4.1.relu_1"``): the cut is at its
        output. By default where the last layer with weights begins, before dropout: the pooled
        features in most architectures.

    Raises
    ------
    UserError
        If there is no such layer, or the network cannot be cut there; the message lists the
        layers at which it can.
    """
    graphs = []
    name = feature_layer
    for training in (True, False):
        traced = _Traced(network, training=training)
        node = (
            traced.default_feature_layer() if feature_layer is None else traced.find(feature_layer)
        )
        if feature_layer is None and node not in traced.cuts():
            raise UserError(
                "the network has no default feature layer; name one. "
                f"Possible: {', '.join(traced.layers())}"
            )
        graphs.append(traced.parts(node))
        name = traced.names[node] if feature_layer is None else feature_layer
    assert name is not None
    (train_front, train_back), (eval_front, eval_back) = graphs
    features = DualGraphModule(network, train_front, eval_front, "Features")
    classifier = DualGraphModule(network, train_back, eval_back, "Classifier")
    features.train(network.training)
    classifier.train(network.training)
    return BackboneAndClassifier(features, classifier, name)


def default_feature_layer(network: nn.Module) -> str:
    """Return the name of the layer at which `split_network` cuts by default."""
    traced = _Traced(network, training=False)
    return str(traced.names[traced.default_feature_layer()])


def output_layer(network: nn.Module) -> str:
    """Return the name of the layer that makes the logits; its weight is ``(C, ...)``."""
    return str(_Traced(network, training=False).output_layer().target)


def feature_shape(features: nn.Module, image_size: int) -> tuple[int, ...]:
    """Return the shape of the features of one square RGB image, without the batch dimension.

    Raises
    ------
    UserError
        If the network does not take images of this size.
    """
    device = next((p.device for p in features.parameters()), torch.device("cpu"))
    was_training = features.training
    features.eval()
    try:
        with torch.no_grad():
            images = torch.zeros(2, 3, image_size, image_size, device=device)
            # A traced module that is called itself prints a trace beside the error.
            output = nn.Module.__call__(features, images)
    except (RuntimeError, AssertionError) as error:  # what torch and torchvision raise for sizes
        raise UserError(
            f"the network does not take images of {image_size} x {image_size} pixels "
            f"({str(error).splitlines()[0]}): give another image size"
        ) from error
    finally:
        features.train(was_training)
    if not isinstance(output, Tensor) or output.dim() < 2 or len(output) != 2:
        raise UserError(
            "the features must be a tensor with the batch as its first dimension; they are "
            + (
                f"of shape {tuple(output.shape)}"
                if isinstance(output, Tensor)
                else type(output).__name__
            )
        )
    return tuple(output.shape[1:])
