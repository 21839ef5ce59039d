"""An owner's words in a card survive what is written anew."""

import pytest
import yaml

from perturbdiff.cards import MAX_CARD_BYTES, card_text, read_card, renewed, with_own_text

NEW = card_text(
    "license: mit\ntags:\n- biology\nmodel-index:\n- name: new\n", {"Summary": "# M", "Limits": "new score"}
)
OLD = card_text("tags:\n- biology\nbase_model: a/b\nmodel-index:\n- name: old\n", {"Summary": "# M", "Limits": "old"})
MARK = "<!-- generated: Limits -->"


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_generated_parts_are_new_and_all_else_is_kept():
    old = OLD.replace(MARK, f"<img src=x>\n\n## Mine\n\n{MARK}") + "\nThe end, 3 < 4.\n"
    assert with_own_text(NEW, old) == NEW.replace(MARK, f"<img src=x>\n\n## Mine\n\n{MARK}") + "\nThe end, 3 < 4.\n"
    assert with_own_text(NEW, old.replace("\n", "\r\n")) == with_own_text(NEW, old)
    assert with_own_text(NEW, OLD) == NEW


def test_a_part_that_the_owner_took_out_or_moved_stays_so():
    summary, limits = (f"<!-- generated: {name} -->\n" for name in ("Summary", "Limits"))
    first = OLD[OLD.index(summary) : OLD.index(limits)]
    assert "# M" not in with_own_text(NEW, OLD.replace(first, ""))
    moved = with_own_text(NEW, OLD.replace(first, "") + first)
    assert moved.index("new score") < moved.index("# M")


def test_keys_of_the_owner_are_kept_as_they_are_written():
    own = "language: no\nversion: 1.10  # not 1.1\n'a key': {b: 1,\n  c: [2]\n}\nwidget:\n- text: >\n    license: x\n"
    card = with_own_text(NEW, OLD.replace("tags:\n", own + "tags:\n- mine\n"))
    assert own in card
    assert front(card)["tags"] == ["biology", "mine"]
    assert front(card)["model-index"] == [{"name": "new"}]
    assert "base_model" not in front(card)  # of the model that was there before


def test_a_license_of_the_owner_stays_where_none_is_known():
    without = NEW.replace("license: mit\n", "")
    old = OLD.replace("tags:", "license: other\nlicense_name: mine\ntags:")
    assert (front(with_own_text(without, old))["license"], front(with_own_text(without, old))["license_name"]) == (
        "other",
        "mine",
    )
    assert front(with_own_text(NEW, old))["license"] == "mit"
    assert "license_name" not in front(with_own_text(NEW, old))


@pytest.mark.parametrize(
    "old",
    [
        "# Mine\n",
        "",
        OLD.replace(f"{MARK}\n", ""),
        OLD.replace("<!-- end of generated -->\n", "", 1),
        OLD + "<!-- end of generated -->\n",
    ],
)
def test_a_card_without_whole_parts_is_kept_and_said_to_be_old(old):
    with pytest.warns(UserWarning, match="the README.md of lab/kang has no generated parts.* scores may be old"):
        assert renewed(NEW, old, "lab/kang") == old


@pytest.mark.parametrize("tags", ["[a, b", "{a: b}", "&x [*x]", "[" * 3000])
def test_odd_tags_are_none(tags):
    assert front(with_own_text(NEW, OLD.replace("tags:\n- biology\n", f"tags: {tags}\n")))["tags"] == ["biology"]


def test_what_is_no_text_is_no_card(tmp_path):
    assert read_card(tmp_path / "README.md") is None
    (tmp_path / "README.md").write_bytes(b"\xff")
    assert read_card(tmp_path / "README.md") is None
    (tmp_path / "README.md").write_bytes(b" " * (MAX_CARD_BYTES + 1))
    assert read_card(tmp_path / "README.md") is None
    (tmp_path / "README.md").write_bytes(b"a\r\n")
    assert read_card(tmp_path / "README.md") == "a\r\n"
