from k2train.config import changed_settings, refuse_changes

BEFORE = {"seed": 1, "optim": {"lr": 0.01, "roles": {"norm": {"lr": 0.01}}}, "track": {"wandb": "off"}, "old": 1}
AFTER = {"seed": 1, "optim": {"lr": 0.02, "roles": {"norm": {"lr": 0.01}}}, "track": {"wandb": None}}


def test_every_change_is_named_and_those_that_decide_the_numbers_are_told_apart():
    assert [(c.sentence, c.harmless) for c in changed_settings(BEFORE, AFTER)] == [
        ("old was 1 and is now absent", False),
        ("optim.lr was 0.01 and is now 0.02", False),
        ("track.wandb was off and is now null", True),
    ]
    assert changed_settings(BEFORE, BEFORE) == []


def test_how_a_start_is_made_is_no_setting_of_the_run():
    start = {"resume": "runs/a", "allow_changed": ["optim.lr"]}
    assert changed_settings({"resume": "auto", "allow_changed": []}, start) == []


def test_prefixes_are_whole_keys():
    (change,) = changed_settings({"tracking": 1}, {"tracking": 2})
    assert not change.harmless


def test_a_refusal_says_how_to_have_it_all_the_same():
    changes = changed_settings(BEFORE, AFTER)
    refusal = refuse_changes(changes, allowed=["optim.lr"], what="the run a in b")
    assert refusal == (
        "the run a in b has other settings: old was 1 and is now absent. Give this one another name, as in "
        "name=second, or take the settings back; to go on with them all the same: allow_changed=[optim.lr,old]"
    )
    assert refuse_changes(changes, allowed=["optim", "old"], what="") is None
    assert refuse_changes(changes, allowed=[], what="").endswith("allow_changed=[old,optim.lr]")
    assert refuse_changes(changes[2:], allowed=[], what="") is None
