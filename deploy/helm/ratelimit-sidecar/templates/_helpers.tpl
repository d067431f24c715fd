{{- define "ratelimit-sidecar.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "ratelimit-sidecar.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Of every pod that is in the mesh, also of those that the container was added to. */}}
{{- define "ratelimit-sidecar.meshLabel" -}}
ratelimit-sidecar/mesh: {{ include "ratelimit-sidecar.fullname" . }}
{{- end }}

{{- define "ratelimit-sidecar.labels" -}}
{{ include "ratelimit-sidecar.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "ratelimit-sidecar.metadata" -}}
name: {{ include "ratelimit-sidecar.fullname" . }}
namespace: {{ .Release.Namespace }}
labels: {{- include "ratelimit-sidecar.labels" . | nindent 2 }}
{{- end }}

{{- define "ratelimit-sidecar.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- define "ratelimit-sidecar.rulesConfigMap" -}}
{{- if .Values.rulesConfigMap }}{{ .Values.rulesConfigMap }}
{{- else if .Values.rules }}{{ include "ratelimit-sidecar.fullname" . }}-rules
{{- end }}
{{- end }}

{{/* "yes" when an init container has to ask which region the node is in. */}}
{{- define "ratelimit-sidecar.asksForRegion" -}}
{{- if and (not .Values.region) (semverCompare "<1.35-0" .Capabilities.KubeVersion.Version) }}yes{{ end }}
{{- end }}

{{/* sidecar.yaml, of what the values say; `config` wins. */}}
{{- define "ratelimit-sidecar.config" -}}
{{- $tls := .Values.mesh.tls }}
{{- $ports := .Values.ports }}
{{- $inPod := eq .Values.kind "Sidecar" }}
{{- $fullname := include "ratelimit-sidecar.fullname" . }}
{{- $own := printf "%s-mesh.%s.svc:%v" $fullname .Release.Namespace $ports.mesh }}
{{- $listen := dict
  "grpc" (list (printf "%s:%v" (ternary "127.0.0.1" "0.0.0.0" $inPod) $ports.grpc))
  "admin" (printf "0.0.0.0:%v" $ports.admin)
  "sync" (printf "0.0.0.0:%v" $ports.mesh) }}
{{- if .Values.grpcTls.secretName }}
{{- $files := "/etc/ratelimit-sidecar/grpc-tls" }}
{{- $grpcTls := dict "certificate" (printf "%s/tls.crt" $files) "key" (printf "%s/tls.key" $files) }}
{{- if .Values.grpcTls.verifyClients }}{{ $_ := set $grpcTls "ca" (printf "%s/ca.crt" $files) }}{{ end }}
{{- $_ := set $listen "tls" $grpcTls }}
{{- end }}
{{- $sync := dict "peers" (prepend .Values.mesh.peers $own) }}
{{- if eq $tls.from "insecure" }}
{{- $_ := set $sync "insecure" true }}
{{- else }}
{{- $names := $tls.peerNames }}
{{- if eq $tls.from "csi" }}{{ $names = printf "{node}.%s" $tls.domain }}{{ end }}
{{- if eq $tls.from "certManager" }}{{ $names = printf "ratelimit.{region}.%s" $tls.domain }}{{ end }}
{{- $files := "/etc/ratelimit-sidecar/mesh-tls" }}
{{- $_ := set $sync "tls" (dict
  "certificate" (printf "%s/tls.crt" $files) "key" (printf "%s/tls.key" $files) "ca" (printf "%s/ca.crt" $files)
  "peer_names" $names) }}
{{- end }}
{{- $config := dict "listen" $listen "sync" $sync }}
{{- if include "ratelimit-sidecar.rulesConfigMap" . }}
{{- $_ := set $config "rules" (list "/etc/ratelimit-sidecar/rules") }}
{{- end }}
{{- if .Values.persistence.enabled }}
{{- $_ := set $config "persistence" (dict "file" "/var/lib/ratelimit-sidecar/state") }}
{{- end }}
{{- mergeOverwrite $config (deepCopy .Values.config) | toYaml }}
{{- end }}

{{/* The container, without an indent. */}}
{{- define "ratelimit-sidecar.container" -}}
name: ratelimit-sidecar
image: {{ include "ratelimit-sidecar.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- if include "ratelimit-sidecar.asksForRegion" . }}
args: [serve, --config, /run/ratelimit-sidecar/sidecar.yaml]
{{- else }}
args: [serve, --config, /etc/ratelimit-sidecar/config/sidecar.yaml]
{{- end }}
env:
  {{- if .Values.region }}
  - name: REGION
    value: {{ .Values.region | quote }}
  {{- else if not (include "ratelimit-sidecar.asksForRegion" .) }}
  - name: REGION
    valueFrom: {fieldRef: {fieldPath: "metadata.labels['topology.kubernetes.io/region']"}}
  {{- end }}
  # For traces and pushed metrics.
  - {name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
  - {name: POD_NAMESPACE, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}
  - {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
  {{- with .Values.env }}{{ toYaml . | nindent 2 }}{{ end }}
ports:
  - {name: grpc, containerPort: {{ .Values.ports.grpc }}}
  - {name: admin, containerPort: {{ .Values.ports.admin }}}
  - {name: mesh, containerPort: {{ .Values.ports.mesh }}}
startupProbe:
  httpGet: {path: /readyz, port: {{ .Values.ports.admin }}}
  periodSeconds: 1
  failureThreshold: 300
readinessProbe:
  httpGet: {path: /readyz, port: {{ .Values.ports.admin }}}
  periodSeconds: 5
livenessProbe:
  httpGet: {path: /healthz, port: {{ .Values.ports.admin }}}
  periodSeconds: 10
  timeoutSeconds: 5
{{- if ne .Values.kind "Sidecar" }}
lifecycle:
  # Envoys have to learn first that this pod goes.
  preStop: {sleep: {seconds: 5}}
{{- end }}
resources: {{- toYaml .Values.resources | nindent 2 }}
securityContext: {{- include "ratelimit-sidecar.containerSecurity" . | nindent 2 }}
volumeMounts:
  - {name: ratelimit-config, mountPath: /etc/ratelimit-sidecar/config, readOnly: true}
  {{- if include "ratelimit-sidecar.rulesConfigMap" . }}
  - {name: ratelimit-rules, mountPath: /etc/ratelimit-sidecar/rules, readOnly: true}
  {{- end }}
  {{- if include "ratelimit-sidecar.asksForRegion" . }}
  - {name: ratelimit-run, mountPath: /run/ratelimit-sidecar, readOnly: true}
  {{- end }}
  {{- if ne .Values.mesh.tls.from "insecure" }}
  - {name: ratelimit-mesh-tls, mountPath: /etc/ratelimit-sidecar/mesh-tls, readOnly: true}
  {{- end }}
  {{- if .Values.grpcTls.secretName }}
  - {name: ratelimit-grpc-tls, mountPath: /etc/ratelimit-sidecar/grpc-tls, readOnly: true}
  {{- end }}
  {{- if .Values.persistence.enabled }}
  - {name: ratelimit-state, mountPath: /var/lib/ratelimit-sidecar}
  {{- end }}
{{- end }}

{{- define "ratelimit-sidecar.containerSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "ratelimit-sidecar.regionContainer" -}}
name: ratelimit-region
image: {{ include "ratelimit-sidecar.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command: [python, /etc/ratelimit-sidecar/config/region.py]
args: [/etc/ratelimit-sidecar/config/sidecar.yaml, /run/ratelimit-sidecar/sidecar.yaml]
env:
  - name: NODE_NAME
    valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
resources:
  requests: {cpu: 50m, memory: 64Mi}
  limits: {memory: 128Mi}
securityContext: {{- include "ratelimit-sidecar.containerSecurity" . | nindent 2 }}
volumeMounts:
  - {name: ratelimit-config, mountPath: /etc/ratelimit-sidecar/config, readOnly: true}
  - {name: ratelimit-run, mountPath: /run/ratelimit-sidecar}
{{- end }}

{{- define "ratelimit-sidecar.volumes" -}}
- name: ratelimit-config
  configMap: {name: {{ include "ratelimit-sidecar.fullname" . }}}
{{- if include "ratelimit-sidecar.rulesConfigMap" . }}
- name: ratelimit-rules
  configMap: {name: {{ include "ratelimit-sidecar.rulesConfigMap" . }}}
{{- end }}
{{- if include "ratelimit-sidecar.asksForRegion" . }}
- name: ratelimit-run
  emptyDir: {medium: Memory, sizeLimit: 1Mi}
{{- end }}
{{- with .Values.mesh.tls }}
{{- if eq .from "csi" }}
- name: ratelimit-mesh-tls
  csi:
    driver: csi.cert-manager.io
    readOnly: true
    volumeAttributes:
      csi.cert-manager.io/issuer-name: {{ .issuerRef.name | quote }}
      csi.cert-manager.io/issuer-kind: {{ .issuerRef.kind | quote }}
      csi.cert-manager.io/issuer-group: {{ .issuerRef.group | quote }}
      csi.cert-manager.io/dns-names: "${POD_NAME}.{{ .domain }}"
      csi.cert-manager.io/key-usages: "digital signature,key encipherment,server auth,client auth"
      csi.cert-manager.io/fs-group: "65532"
{{- else if eq .from "certManager" }}
- name: ratelimit-mesh-tls
  secret: {secretName: {{ include "ratelimit-sidecar.fullname" $ }}-mesh-tls}
{{- else if eq .from "secret" }}
- name: ratelimit-mesh-tls
  secret: {secretName: {{ .secretName }}}
{{- end }}
{{- end }}
{{- with .Values.grpcTls.secretName }}
- name: ratelimit-grpc-tls
  secret: {secretName: {{ . }}}
{{- end }}
{{- if and .Values.persistence.enabled (eq .Values.kind "DaemonSet") }}
- name: ratelimit-state
  hostPath: {path: {{ .Values.persistence.hostPath }}, type: Directory}
{{- end }}
{{- end }}
