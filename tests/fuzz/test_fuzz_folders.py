"""Folders damaged in several ways at once, and at random bytes: whatever they hold, a loader gives a
model or says in one line which folder it could not read."""

import shutil

import pytest
from damage import FILES, WEIGHTS
from harness import fuzz
from hypothesis import strategies as st
from test_damage import FAMILIES
from tiny import tokenizer_of

DAMAGES = FILES | WEIGHTS


@st.composite
def cases(draw):
    """(family, damages, [(file, where in it from 0 to 1, byte)])."""
    name, share, byte = st.integers(0, 9), st.floats(0, 1, exclude_max=True), st.integers(0, 255)
    flips = draw(st.lists(st.tuples(name, share, byte), max_size=4))
    damages = draw(st.lists(st.sampled_from([*DAMAGES]), min_size=not flips, max_size=3))
    return draw(st.sampled_from([*FAMILIES])), damages, flips


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A whole folder of each family."""
    made = {}
    for family, (_, build) in FAMILIES.items():
        made[family] = tmp_path_factory.mktemp(family)
        model = build()
        model.save_pretrained(made[family])
        tokenizer_of(model.config.vocab_size).save_pretrained(made[family])
    return made


@pytest.mark.slow
def test_folders(folders, tmp_path, fuzz_seconds):
    def check(case):
        family, damages, flips = case
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folders[family], folder)
        for name in damages:
            try:
                DAMAGES[name](folder)
            except Exception:  # what it would damage is gone, or no longer to be read
                continue
        files = [file for file in sorted(folder.iterdir()) if file.is_file()]
        for number, share, byte in flips:
            content = bytearray(files[number % len(files)].read_bytes() if files else b"")
            if content:
                content[int(share * len(content))] = byte
                files[number % len(files)].write_bytes(content)
        try:
            FAMILIES[family][0](folder)
        except ValueError as error:
            assert "\n" not in str(error) and str(folder) in str(error), str(error)

    fuzz(check, cases(), 40, fuzz_seconds)
