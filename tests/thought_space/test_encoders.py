"""The two towers: what is saved is what is loaded, and no text is no vector."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

from pulse_ray.thought_space.encoders import Encoders


@pytest.mark.parametrize("shared", [False, True])
def test_saved_encoders_give_the_same_unit_vectors(tmp_path: Path, shared: bool) -> None:
    encoders = Encoders.create(str(tiny.make_encoder(tmp_path / "bert")), 16, shared=shared).eval()
    encoders.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "history").exists() != shared
    loaded = Encoders.load(tmp_path / "saved")
    texts = ["they like tea", "they like unscented hand cream " * 20]
    for tower in ("rationale", "history"):
        vectors = encoders.encode(tower, texts)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
        np.testing.assert_allclose(loaded.encode(tower, texts), vectors, atol=1e-6)
        assert loaded.encode(tower, []).shape == (0, vectors.shape[1])
