"""Small algebra runs in one thread, and only while it runs."""

from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from mlxpref.ranking import bradley_terry
from mlxpref.ranking.bradley_terry import PairOutcome, fit_strengths


def blas_threads() -> list[int]:
    return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]


def test_a_fit_uses_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    before, during, working = blas_threads(), list[int](), bradley_terry.WorkingAnswers

    def seen(*arguments: Any, **options: Any) -> Any:
        during.extend(blas_threads())
        return working(*arguments, **options)

    monkeypatch.setattr(bradley_terry, "WorkingAnswers", seen)
    fit = fit_strengths(3, [PairOutcome(0, 1, 0.8, 0.7), PairOutcome(1, 2, 0.6, 0.6)])
    assert np.isfinite(fit.strengths).all()
    assert set(during) == {1}
    assert blas_threads() == before
