"""Matrix multiplication with compressed weights, for processors on which OpenVINO's own is slow."""
