from k2train.config.compare import changed_settings


def test_what_decides_the_numbers_is_named_and_the_rest_is_free():
    before = {"seed": 1, "optim": {"lr": 0.01, "roles": {"norm": {"lr": 0.01}}}, "track": {"wandb": "off"}, "old": 1}
    after = {"seed": 1, "optim": {"lr": 0.02, "roles": {"norm": {"lr": 0.01}}}, "track": {"wandb": "auto"}}
    assert changed_settings(before, after) == ["old was 1 and is now absent", "optim.lr was 0.01 and is now 0.02"]
    assert changed_settings(before, before) == []


def test_prefixes_are_whole_keys():
    assert changed_settings({"tracking": 1}, {"tracking": 2}) == ["tracking was 1 and is now 2"]
