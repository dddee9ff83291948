"""A recommended judge that is tiny, and is converted at its first use as the real ones are."""

import pytest

from mlxpref.checkpoints.recommended import RecommendedJudge

ID = "owner/tiny-judge"
LICENCE = "mit"


def recommended(hub_id: str = ID) -> RecommendedJudge:
    """An entry of recommended.toml of a tiny judge: 100 kB when it is converted, little memory."""
    gb = dict.fromkeys(("judging_gb", "judging_cpu_gb", "training_gb", "training_cpu_gb"), 0.5)
    return RecommendedJudge(
        hub_id,
        "mlxpref",
        "66.0 as others say",
        LICENCE,
        True,
        0.0002,
        0.0001,
        **gb,
        tried=False,
        checked="in this test",
    )


def recommend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it be the only recommended judge of this process."""
    monkeypatch.delenv("MLXPREF_MODEL", raising=False)
    monkeypatch.setattr("mlxpref.checkpoints.recommended.recommended_judges", lambda: [recommended()])
