{{- /* The template of a pod, the same for one daemon and for a fleet. */ -}}
{{- define "esm-poller.pod" -}}
{{- $scheme := include "esm-poller.scheme" . -}}
metadata:
  labels:
    {{- /* Without the chart's version: a new chart alone is no reason to restart. */ -}}
    {{- include "esm-poller.selectorLabels" . | nindent 4 }}
    app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/config: {{ include "esm-poller.checksum" . }}
    {{- if and .Values.metrics.annotations (not .Values.serviceMonitor.enabled) }}
    prometheus.io/scrape: "true"
    prometheus.io/scheme: {{ $scheme }}
    prometheus.io/port: {{ .Values.config.server.port | quote }}
    prometheus.io/path: /metrics
    {{- end }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "esm-poller.serviceAccountName" . }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  # Longer than the daemon's own grace: killed before it ends, the pod would have its work delivered again.
  terminationGracePeriodSeconds: {{ add (ceil .Values.config.shutdown_grace_seconds) .Values.terminationMarginSeconds }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    {{- toYaml .Values.podSecurityContext | nindent 4 }}
  containers:
    - name: poller
      {{- if .Values.image.digest }}
      image: {{ printf "%s@%s" .Values.image.repository .Values.image.digest | quote }}
      {{- else }}
      image: {{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) | quote }}
      {{- end }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [poller, run]
      args:
        - -c
        - /etc/poller/poller.yaml
        {{- range .Values.extraArgs }}
        - {{ . | quote }}
        {{- end }}
      {{- if or .Values.secretEnv .Values.env }}
      env:
        {{- range .Values.secretEnv }}
        - name: {{ .name }}
          valueFrom:
            secretKeyRef:
              name: {{ .secret }}
              key: {{ .key | quote }}
        {{- end }}
        {{- with .Values.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- end }}
      {{- with .Values.envFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        - name: http
          containerPort: {{ .Values.config.server.port }}
      startupProbe:
        {{- include "esm-poller.probe" (dict "path" "/healthz" "scheme" $scheme "probe" .Values.probes.startup) | nindent 8 }}
      livenessProbe:
        {{- include "esm-poller.probe" (dict "path" "/healthz" "scheme" $scheme "probe" .Values.probes.liveness) | nindent 8 }}
      readinessProbe:
        {{- include "esm-poller.probe" (dict "path" "/readyz" "scheme" $scheme "probe" .Values.probes.readiness) | nindent 8 }}
      resources:
        {{- toYaml .Values.resources | nindent 8 }}
      securityContext:
        {{- toYaml .Values.securityContext | nindent 8 }}
      volumeMounts:
        # The folder, not the file with subPath: that one would never change.
        - name: config
          mountPath: /etc/poller
          readOnly: true
        - name: tmp
          mountPath: /tmp
        {{- if not (include "esm-poller.isFleet" .) }}
        - name: data
          mountPath: {{ .Values.persistence.mountPath }}
        {{- end }}
        {{- range $index, $file := .Values.secretFiles }}
        - name: secret-{{ $index }}
          mountPath: {{ $file.mountPath }}
          readOnly: true
        {{- end }}
        {{- with .Values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ include "esm-poller.fullname" . }}
        defaultMode: 0440
    - name: tmp
      emptyDir:
        sizeLimit: 64Mi
    {{- range $index, $file := .Values.secretFiles }}
    - name: secret-{{ $index }}
      secret:
        secretName: {{ $file.secret }}
        defaultMode: 0440
    {{- end }}
    {{- with .Values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if .Values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml .Values.topologySpreadConstraints | nindent 4 }}
  {{- else if include "esm-poller.isFleet" . }}
  topologySpreadConstraints:
    {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
    - maxSkew: 1
      topologyKey: {{ . }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "esm-poller.selectorLabels" $ | nindent 10 }}
      matchLabelKeys: [pod-template-hash]
    {{- end }}
  {{- end }}
{{- end -}}
