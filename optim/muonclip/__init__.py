"""MuonClip: Muon plus per-head QK-Clip."""
