"""Detectors of torchvision on this project's students, and how detections are measured."""
