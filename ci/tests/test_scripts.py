"""What the scripts of CI and releases decide, without building anything."""

import pytest

import changed
import check_fragments
import check_release
import repository


@pytest.mark.parametrize(
    "file,wanted",
    [
        ("packages/attn-flash/src/attn_flash/api.py", ["attn-all", "attn-flash"]),
        ("packages/attn-all/README.md", ["attn-all"]),
        ("packages/attn-core/src/attn_core/checks.py", repository.names()),
        ("shared/constraints/minimums.txt", repository.names()),
        ("noxfile.py", repository.names()),
        ("README.md", []),
        ("packages/README.md", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_change_affects_its_package_and_what_depends_on_it(file, wanted):
    assert changed.affected([file]) == wanted


def test_every_operator_package_depends_on_core():
    assert repository.dependents("attn-core") == set(repository.names())


@pytest.mark.parametrize(
    "files,silent",
    [
        (["packages/attn-evo/src/attn_evo/api.py"], True),
        (
            ["packages/attn-evo/src/attn_evo/api.py", "packages/attn-evo/changelog.d/+x.fixed.md"],
            False,
        ),
        (
            ["packages/attn-evo/src/attn_evo/api.py", "packages/attn-core/changelog.d/+x.fixed.md"],
            True,
        ),
        (["packages/attn-evo/tests/test_api.py"], False),
    ],
    ids=["code-alone", "code-and-note", "note-elsewhere", "test-alone"],
)
def test_code_needs_a_note_in_its_own_changelog(files, silent):
    assert check_fragments.is_silent("attn-evo", files) is silent


def test_the_first_heading_is_the_newest_version():
    changelog = "# Changelog\n\n## 0.2.0 (2026-12-01)\n\n### Added\n\n## 0.1.0 (2026-11-21)\n"
    assert check_release.first_heading(changelog) == "0.2.0"


def test_a_release_names_every_obstacle(monkeypatch):
    answers = {"rev-parse": "topic", "status": " M a.py", "tag": "attn-evo-v9.0.0"}
    monkeypatch.setattr(check_release, "git", lambda command, *_: answers[command])
    reasons = check_release.obstacles("attn-evo", "attn-evo-v9.0.0")
    for part in (
        "branch is topic",
        "not committed",
        "'9.0.0'",
        "changelog.d",
        "tag attn-evo-v9.0.0",
    ):
        assert any(part in reason for reason in reasons), part
