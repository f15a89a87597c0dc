"""Published configurations of mmdetection, mmsegmentation and mmpretrain, run on generated data."""
