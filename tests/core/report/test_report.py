"""The report: one file that says what the tables say, needs nothing else, and is never broken by what is missing."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d3po_core.errors import D3POError
from d3po_core.people.blind import begin_comparison
from d3po_core.report.answers import pairings, scored
from d3po_core.report.gather import gather
from d3po_core.report.pictures import SHEET_BYTES, SHEETS, comparison_picture
from d3po_core.report.write import duration, render, write_report
from d3po_core.store.stages import stage_path
from d3po_core.store.tables import read_rows
from tests.core.evaluation.compared import say_all
from tests.core.little_campaign import LittleCampaign

PROMPTS = [f"a thing of kind {i}" for i in range(8)]
MINUS = "\N{MINUS SIGN}"
VOID = {"meta", "link", "img", "br", "input", "hr", "use"}


class Page(HTMLParser):
    """The page's visible text, its attributes, and whether its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.attributes, self.open = "", [], []
        self.feed(text)
        self.text = " ".join(self.text.split())
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += f" {data}"


def make(folder: Path, scores: list[float], prompts: list[str] = PROMPTS, **options: Any) -> LittleCampaign:
    campaign = LittleCampaign(folder, prompts)
    for number, score in enumerate(scores):
        wobble = np.linspace(-0.05, 0.05, 2 * len(prompts)).reshape(-1, 2)
        campaign.add_round(number, score + wobble, **options)
    return campaign


def page_of(campaign: LittleCampaign, **options: Any) -> Page:
    return Page(write_report(campaign.folder, **options).read_text())


def sheets_of(text: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="sheets">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_first_screen_answers_the_four_questions(tmp_path: Path) -> None:
    text = page_of(make(tmp_path / "one", [0.2, 0.6, 0.8, 0.7])).text
    answers = text[text.index("Is it better?") : text.index("Held-out score")]
    assert (
        "Is it better? Yes The champion is round 2, which scores 0.800 in brightness where the base scores 0.200"
        in answers
    )
    assert "on prompts that did not choose it, the champion scores 0.800, +0.600" in answers
    assert "It wins 100% of them" in answers
    assert "Which one do I ship? Round 2" in answers
    assert "Why did it change? It learned from 3 pairs" in answers
    assert "Largest gain: round 1, +0.400" in answers
    assert f"Largest loss: round 3, {MINUS}0.100" in answers
    assert "latest round keeps what the champion reached" in answers  # it does not, and the page says so


def test_lineage_names_code_configuration_hashes_runs_and_files(tmp_path: Path) -> None:
    campaign = make(tmp_path / "one", [0.2, 0.5])
    text = page_of(campaign).text
    for expected in ("a1" * 20, "c" * 64, f"{1:064x}", f"{1:032x}", "0" * 32, "learning_rate: 0.002"):
        assert expected in text
    for table in ("samples", "judgements", "preferences", "updates", "update_steps", "evaluations", "rounds"):
        assert f"{campaign.folder}/{table}/round=*/*.parquet" in text


def test_times_are_those_of_the_rounds(tmp_path: Path) -> None:
    campaign = make(tmp_path / "one", [0.2, 0.5, 0.6], train_seconds=90.0)
    text = page_of(campaign).text
    assert "train 1 min 30 s 4 min 30 s" in text
    assert [duration(s) for s in (0.04, 9.94, 10.2, 59.7, 3599, 7500)] == [
        "0.0 s", "9.9 s", "10 s", "1 min 00 s", "59 min 59 s", "2 h 05 min",
    ]  # fmt: skip


def test_page_asks_for_nothing_and_its_images_are_inside(tmp_path: Path) -> None:
    campaign = make(tmp_path / "one", [0.2, 0.5])
    text = write_report(campaign.folder).read_text()
    page = Page(text)
    assert "http:" not in text
    assert "https:" not in text
    assert not re.search(r"@import|url\((?!#)", text)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert value.startswith(("#", "data:image/webp;base64,")), (tag, name, value[:60])
    assert ("meta", "content") in {(tag, name) for tag, name, value in page.attributes if "default-src 'none'" in value}
    assert sum(tag == "img" and value.startswith("data:") for tag, _, value in page.attributes) >= 2
    assert all(sheet["source"].startswith("data:image/webp;base64,") for sheet in sheets_of(text))


def test_page_links_to_the_campaign_in_mlflow_and_to_nothing_else(tmp_path: Path) -> None:
    address = "http://127.0.0.1:5000/#/experiments/1/runs?a=1&b=2"
    page = Page(write_report(make(tmp_path / "one", [0.2, 0.5]).folder, mlflow=address).read_text())
    links = [value for tag, name, value in page.attributes if name == "href" and not value.startswith("#")]
    assert links == [address]


def test_prompts_and_raters_are_text_and_never_markup(tmp_path: Path) -> None:
    evil = [
        "</script><script>alert(1)</script>",
        "<img src=x onerror=alert(2)> & \"quoted\" 'too'",
        "$x_1^2$ {{ 7*7 }}",
    ]
    campaign = make(tmp_path / "one", [0.2, 0.5], prompts=evil)
    campaign.judge(1, "<b>eve</b>", "rating", {"r1-g0-m0": 0.0, "r1-g0-m1": 1.0})
    text = write_report(campaign.folder).read_text()
    page = Page(text)
    assert not re.search(
        r"<script>alert|<img src=x|<b>eve|<i>|<u>\s*<", text.replace("<i class", "").replace("<i aria", "")
    )
    for prompt in evil:
        assert " ".join(prompt.split()) in page.text
    assert "<b>eve</b>" in page.text
    assert not any(name.startswith("on") for _, name, _ in page.attributes)


def test_fifty_rounds_of_noise_stay_below_five_megabytes(tmp_path: Path) -> None:
    campaign = LittleCampaign(tmp_path / "long", PROMPTS, seeds=6, size=64)  # noise: nothing compresses worse
    for number in range(2):
        campaign.add_round(number, np.full((8, 6), number / 10))
    for number in range(2, 51):
        for table in ("samples", "judgements", "preferences", "updates", "evaluations", "rounds", "stages"):
            shutil.copytree(campaign.folder / table / "round=1", campaign.folder / table / f"round={number}")
    path = write_report(campaign.folder)
    sheets = sheets_of(path.read_text())
    assert path.stat().st_size < 5_000_000
    assert len(sheets) == SHEETS
    assert [sheets[0]["label"], sheets[-1]["label"]] == ["base", "round 50"]
    assert [sheet["label"] for sheet in sheets if sheet["champion"]] == ["round 1"]
    assert max(len(sheet["source"]) for sheet in sheets) < SHEET_BYTES * 4 / 3 + 100


def test_base_alone_makes_a_report(tmp_path: Path) -> None:
    text = page_of(make(tmp_path / "one", [0.2])).text
    assert "Nothing to compare yet" in text
    assert "Which one do I ship? None" in text
    assert "There is no pair yet" in text


def test_rounds_without_a_pair_make_a_report_that_says_so(tmp_path: Path) -> None:
    text = page_of(make(tmp_path / "one", [0.2, 0.2], pairs=0)).text
    assert "1 of 1 rounds had no pair at all" in text
    assert "There is no pair yet" in text
    assert "Is it better? Not yet No round scores higher than the base" in text


def test_one_prompt_with_one_image_makes_a_report_without_intervals(tmp_path: Path) -> None:
    campaign = LittleCampaign(tmp_path / "one", ["alone"], seeds=1)
    for number in range(2):
        campaign.add_round(number, np.array([[number / 2]]))
    text = page_of(campaign).text
    assert "Is it better? Not clearly" in text
    assert "too few to tell" in text
    assert "inf" not in re.sub(r"[a-z]{3,}", lambda word: "" if word[0] != "inf" else "inf", text)


def test_images_that_were_never_kept_are_not_missed(tmp_path: Path) -> None:
    campaign = make(tmp_path / "one", [0.2, 0.5], images=False)
    shutil.rmtree(campaign.folder / "images")
    text = page_of(campaign).text
    assert "held-out images are no longer on disk" in text
    assert "image removed" in text
    assert not (campaign.folder / "report").exists()


def test_sheets_outlive_their_images(tmp_path: Path) -> None:
    campaign = make(tmp_path / "one", [0.2, 0.5])
    before = sheets_of(write_report(campaign.folder).read_text())
    shutil.rmtree(campaign.folder / "images")
    assert sheets_of(write_report(campaign.folder).read_text()) == before


def test_another_campaign_of_the_same_name_does_not_show_the_old_ones_images(tmp_path: Path) -> None:
    campaign = make(tmp_path / "one", [0.2, 0.5])
    before = sheets_of(write_report(campaign.folder).read_text())
    identity = json.loads((campaign.folder / "campaign.json").read_text()) | {"id": "f" * 32}
    (campaign.folder / "campaign.json").write_text(json.dumps(identity))
    for path in (campaign.folder / "images").rglob("r*-e*.png"):
        Image.new("RGB", (8, 8), "red").save(path)
    after = sheets_of(write_report(campaign.folder).read_text())
    assert all(new["source"] != old["source"] for new, old in zip(after, before, strict=True))


def test_removed_lora_is_not_offered_for_loading(tmp_path: Path) -> None:
    campaign = make(tmp_path / "one", [0.2, 0.5])
    assert "Its weights are no longer on disk" in page_of(campaign).text
    (campaign.folder / "checkpoints/round=1").mkdir(parents=True)
    (campaign.folder / "checkpoints/round=1/pytorch_lora_weights.safetensors").touch()
    assert 'pipe.load_lora_weights("' in page_of(campaign).text


def test_trained_network_is_loaded_by_its_class(tmp_path: Path) -> None:
    campaign = make(tmp_path / "one", [0.2, 0.5])
    folder = campaign.folder / "checkpoints/round=1/unet"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert "Its weights are no longer on disk" in page_of(campaign).text
    (folder / "diffusion_pytorch_model.safetensors").touch()
    text = page_of(campaign).text
    assert 'pipe.unet = diffusers.UNet2DConditionModel.from_pretrained("' in text
    assert 'subfolder="unet")' in text


def test_people_appear_only_when_they_judged(tmp_path: Path) -> None:
    campaign = make(tmp_path / "one", [0.2, 0.5], pairs=3)
    assert "Raters" not in page_of(campaign).text
    # The proxy prefers the first member of groups 0 to 2 and ties group 3; ann agrees, disagrees, ties, decides.
    marks = {"g0-m0": 1, "g0-m1": 0, "g1-m0": 0, "g1-m1": 1, "g2-m0": 1, "g2-m1": 1, "g3-m0": 0, "g3-m1": 1}
    campaign.judge(1, "ann", "rating", {f"r1-{name}": float(mark) for name, mark in marks.items()})
    facts = gather(campaign.folder)
    (counts,) = facts.crossing_counts
    names = ("pairs", "agree", "disagree", "only_people", "people_undecided")
    assert [counts[name] for name in names] == [4, 1, 1, 1, 1]
    (crossing,) = facts.crossings
    assert crossing["people_path"] == "images/round=1/r1-g1-m1.png"
    assert crossing["proxy_path"] == "images/round=1/r1-g1-m0.png"
    text = page_of(campaign).text
    assert "judged by prompt_alignment and 1 person" in text
    assert "Krippendorff's alpha \N{EN DASH} equal votes \N{EN DASH} pairs with several raters 0" in text
    assert "People and proxies agree on 50%" in text
    assert "ann human 1 4 0 2.0" in text


def test_gold_answers_are_no_people(tmp_path: Path) -> None:
    campaign = make(tmp_path / "one", [0.2, 0.5])
    for key in ("key", "other key"):
        campaign.judge(1, key, "rating", {"r1-g0-m0": 0.0, "r1-g0-m1": 1.0}, rater_kind="gold")
    assert gather(campaign.folder).crossing_counts == []
    campaign.judge(1, "ann", "rating", {"r1-g0-m0": 1.0, "r1-g0-m1": 0.0})
    (counts,) = gather(campaign.folder).crossing_counts
    assert (counts["agree"], counts["disagree"]) == (1, 0)


def test_what_people_prefer_is_told_when_they_compared(tmp_path: Path) -> None:
    folder = make(tmp_path / "x", [0.2, 0.8, 0.5]).folder
    assert "In blind comparisons, people" not in write_report(folder).read_text()
    assert "What people prefer" not in write_report(folder).read_text()
    for number, vote in ((1, 1), (2, -1)):
        say_all(folder, begin_comparison(folder, number, 0, pairs=16).comparison, lambda _, vote=vote: vote)
    page = Page(write_report(folder).read_text())
    assert "prefer it in 100% of 16 pairs (63 to 100%)" in page.text
    assert "round 1, champion base 1.000 [0.631, 1.000] better 16 16 0 1" in page.text
    assert "round 2 base 0.000 [0.000, 0.369] worse 16 16 0 1" in page.text
    assert "Failed: people do not prefer" not in page.text


def test_champion_that_people_like_less_than_the_base_is_an_alarm(tmp_path: Path) -> None:
    folder = make(tmp_path / "x", [0.2, 0.8]).folder
    say_all(folder, begin_comparison(folder, 1, 0, pairs=16).comparison, lambda _: -1)
    assert "Failed: people do not prefer the base" in Page(write_report(folder).read_text()).text


def test_clear_pairs_and_doubtful_pairs_are_told_apart_by_agreement_then_margin(tmp_path: Path) -> None:
    campaign = make(tmp_path / "one", [0.2, 0.5], pairs=4)
    assert gather(campaign.folder).doubtful_pairs == []
    with_agreement = [
        {"pair_id": f"r1-g{g}-0>1", "group_id": f"r1-g{g}", "winner_id": f"r1-g{g}-m0", "loser_id": f"r1-g{g}-m1",
         "weight": 1.0, "num_raters": 3, "agreement": agreement}
        for g, agreement in enumerate((1.0, 0.4, 0.9, 0.6))
    ]  # fmt: skip
    campaign.write("preferences", 1, with_agreement)
    facts = gather(campaign.folder, examples=2)
    assert [pair["agreement"] for pair in facts.clear_pairs] == [1.0, 0.9]
    assert [pair["agreement"] for pair in facts.doubtful_pairs] == [0.4, 0.6]
    assert facts.clear_pairs[0]["scores"] == [("brightness", 1.0, 0.0)]
    # Scores of 1 and 0, four and six of them: the standard deviation is sqrt(0.4 * 0.6).
    assert facts.clear_pairs[0]["margin"] == pytest.approx(1 / np.sqrt(0.24))


def test_changes_of_the_configuration_are_dated(tmp_path: Path) -> None:
    campaign = make(tmp_path / "one", [0.2, 0.3, 0.4])
    path = stage_path(campaign.folder, 2, "config")
    config = json.loads(path.read_text())
    config["train"]["learning_rate"] = 1e-4
    del config["train"]["beta"]  # written by a program that did not know it: no change
    path.write_text(json.dumps(config))
    assert gather(campaign.folder).config_changes == [
        {"round": 2, "field": "train.learning_rate", "before": 0.002, "after": 1e-4}
    ]
    assert "Round 2: train.learning_rate 0.002 became 0.0001" in page_of(campaign).text


def test_scorer_that_suffers_is_an_alarm(tmp_path: Path) -> None:
    campaign = LittleCampaign(tmp_path / "one", PROMPTS)
    for number in range(2):
        campaign.add_round(number, {"main": np.full((8, 2), number), "other": np.full((8, 2), -number)})
    text = page_of(campaign).text
    assert "Look at 1 of" in text
    assert f"Failed: other did not fall. {MINUS}1.000 [{MINUS}1.000, {MINUS}1.000] against base: worse." in text


def test_latest_round_that_jumped_is_an_alarm_and_an_earlier_one_is_not(tmp_path: Path) -> None:
    campaign = make(tmp_path / "one", [0.2, 0.3, 0.4, 0.5, 0.6])
    third, fourth = (read_rows(campaign.folder / f"rounds/round={n}/part.parquet")[0] for n in (3, 4))
    campaign.write("rounds", 3, [third | {"kl_after": 0.1 * 10.5}])
    text = page_of(campaign).text
    assert "The KL jumped in a round and came back It was more than 10 times its median (0.100) in round 3" in text
    campaign.write("rounds", 4, [fourth | {"kl_after": 2e8}])
    text = page_of(campaign).text
    assert "Failed: the KL per round stays similar" in text
    assert "in round 4, at most 2.0e+08 nats" in text
    assert re.search(r" 1e\+0[5-8] ", text)  # the curve turned logarithmic, its ticks are plain text
    assert "$" not in text


def test_prompts_that_are_clearly_worse_are_counted_and_named(tmp_path: Path) -> None:
    campaign = LittleCampaign(tmp_path / "one", PROMPTS, seeds=8)
    after = np.ones((8, 8))
    after[3] = -1.0  # clearly: all eight images
    after[5] = np.tile([-1.0, 0.9], 4)  # lower, but not clearly
    campaign.add_round(0, np.zeros((8, 8)))
    campaign.add_round(1, after)
    text = page_of(campaign).text
    assert "Failed: few prompts got worse" in text
    assert f"2 of 8 held-out prompts score lower than at the base, 1 of them clearly; worst: “{PROMPTS[3]}”" in text


def test_checkpoint_is_held_against_each_other_one_once(tmp_path: Path) -> None:
    facts = gather(make(tmp_path / "one", [0.2, 0.6, 0.4, 0.5]).folder)
    (scorer,) = scored(facts)
    found = [(row["checkpoint"], row["against"], row["comparison"].difference.mean) for row in pairings(facts, scorer)]
    assert [row[:2] for row in found] == [
        ("round 1, champion", "base, the round before, champion until then"),
        ("round 3", "base"),
        ("round 3", "round 2, the round before"),
        ("round 3", "round 1, champion until then"),
    ]
    assert [row[2] for row in found] == pytest.approx([0.4, 0.3, 0.1, -0.1])


def test_report_is_replaced_whole_and_can_lie_elsewhere(tmp_path: Path) -> None:
    campaign = make(tmp_path / "one", [0.2, 0.5])
    first = write_report(campaign.folder)
    assert first == campaign.folder / "report.html"
    campaign.add_round(2, np.full((8, 2), 0.9))
    assert write_report(campaign.folder, tmp_path / "away" / "r.html") == tmp_path / "away" / "r.html"
    assert "2 rounds on" in Page((tmp_path / "away" / "r.html").read_text()).text
    assert "1 round on" in Page(first.read_text()).text
    assert [path.name for path in (tmp_path / "away").iterdir()] == ["r.html"]


def test_same_campaign_gives_the_same_page_but_for_the_time_of_writing(tmp_path: Path) -> None:
    facts = gather(make(tmp_path / "one", [0.2, 0.5]).folder)
    first, second = (re.sub(r"Written .*? UTC", "", render(facts)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("what", ["nothing", "no round"])
def test_folder_without_a_finished_round_is_a_one_line_error(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "one"
    if what == "no round":
        LittleCampaign(folder, PROMPTS)
    with pytest.raises(D3POError, match=r"is no campaign|has no finished round yet") as caught:
        write_report(folder)
    assert "\n" not in str(caught.value)
    assert not (folder / "report.html").exists()


def test_comparison_picture_has_a_row_a_checkpoint(tmp_path: Path) -> None:
    facts = gather(make(tmp_path / "one", [0.2, 0.5]).folder)
    path = comparison_picture(facts.held_out, ["base", "round 1"], tmp_path / "two.png", prompts=3)
    with Image.open(path) as picture:
        width, height = picture.size
        pixels = np.asarray(picture.convert("RGB"))
    assert (width, height) == (150 + 3 * (2 * 100 + 8), 64 + 2 * 100 + 4)
    assert np.ptp(pixels[64:160, 150:246]) > 100  # an image, not a hole
    shutil.rmtree(tmp_path / "one" / "images")
    with pytest.raises(D3POError, match="none of the images of base, round 1 is on disk"):
        comparison_picture(facts.held_out, ["base", "round 1"], path)
