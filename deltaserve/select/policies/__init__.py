"""Ways to choose samples, by Modyn's names: `POLICIES[name].choose(features, k, seed)`."""

from __future__ import annotations

from deltaserve.select.policies import matrix, presampling, scored
from deltaserve.select.policies.base import Choice, Features, Policy

__all__ = ["POLICIES", "Choice", "Features", "Policy"]

PRESAMPLING = (
    Policy("random", "presampling", (), presampling.random),
    Policy("random_no_replacement", "presampling", ("used",), presampling.random_no_replacement),
    Policy("label_balanced", "presampling", ("labels",), presampling.label_balanced),
    Policy("trigger_balanced", "presampling", ("triggers",), presampling.trigger_balanced),
)
DOWNSAMPLING = (
    Policy("loss", "downsampling", ("loss",), scored.drawn("loss")),
    Policy("gradnorm", "downsampling", ("gradnorm",), scored.drawn("gradnorm")),
    Policy("margin", "downsampling", ("margin",), scored.highest("margin")),
    Policy("entropy", "downsampling", ("entropy",), scored.highest("entropy")),
    Policy(
        "least_confidence",
        "downsampling",
        ("least_confidence",),
        scored.highest("least_confidence"),
    ),
    Policy("rholoss", "downsampling", ("loss", "reference_loss"), scored.rholoss),
    Policy("kcenter", "downsampling", ("vectors",), matrix.kcenter),
    Policy("craig", "downsampling", ("vectors",), matrix.craig),
    Policy("gradmatch", "downsampling", ("vectors",), matrix.gradmatch),
    Policy("submodular", "downsampling", ("vectors",), matrix.submodular),
    Policy("rs2", "downsampling", (), presampling.rs2),
    Policy("rs2_with_replacement", "downsampling", (), presampling.rs2_with_replacement),
)
POLICIES = {policy.name: policy for policy in (*PRESAMPLING, *DOWNSAMPLING)}
