"""Detection and instance segmentation: feature pyramid, Mask R-CNN, Cascade Mask R-CNN, and COCO's metric."""
